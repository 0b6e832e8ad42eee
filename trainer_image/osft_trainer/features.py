"""What the datasets package wrote into a table about its columns, and the values that it meant.

Lives here: turning a column's stored form back: JSON in a string, class numbers, lists of objects
that are stored as an object of lists. Must never: read files, or know what a row means (`samples`
does).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Decoder = Callable[[Any], Any]

_METADATA = b"huggingface"


def row_decoder(metadata: Mapping[bytes, bytes] | None) -> Decoder | None:
    """A function that gives a row as it was before it was stored; None where nothing is to be done.

    Args:
        metadata: of the table's schema.
    """
    try:
        described = json.loads((metadata or {}).get(_METADATA, b"{}"))
        features = (described.get("info") or {}).get("features")
    except (ValueError, AttributeError):
        return None  # another program's text under the same name
    return _decoder(features) if isinstance(features, dict) else None


def _decoder(feature: Any) -> Decoder | None:
    """By the description of a column, or of a part of one. Older versions give lists as [item]."""
    if isinstance(feature, list):
        return _of_list(feature[0]) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    match feature.get("_type"):
        case "Json":
            return _json_value
        case "ClassLabel":
            return _class_name(feature.get("names"))
        case "List" | "LargeList" | "Sequence":
            return _of_list(feature.get("feature"))
        case str():
            return None
    fields = {key: _decoder(inner) for key, inner in feature.items()}
    return _of_object({key: decode for key, decode in fields.items() if decode is not None})


def _of_object(fields: Mapping[str, Decoder]) -> Decoder | None:
    if not fields:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: fields[key](v) if key in fields else v for key, v in value.items()}

    return decode


def _of_list(item: Any) -> Decoder | None:
    inner = _decoder(item)
    # Of a plain object only such a list is stored as an object of lists.
    is_object = isinstance(item, dict) and not isinstance(item.get("_type"), str)
    if inner is None and not is_object:
        return None

    def decode(value: Any) -> Any:
        if isinstance(value, Mapping):
            value = objects_of_lists(value) or value
        if not isinstance(value, list) or inner is None:
            return value
        return [inner(each) for each in value]

    return decode


def objects_of_lists(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """{"a": [1, 2], "b": [3, 4]} as [{"a": 1, "b": 3}, {"a": 2, "b": 4}].

    None if the value is not of that form.
    """
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return None
    if len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


def _json_value(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _class_name(names: Any) -> Decoder | None:
    if not isinstance(names, list):
        return None

    def decode(value: Any) -> Any:
        known = isinstance(value, int) and 0 <= value < len(names)
        return names[value] if known else value

    return decode

"""Turns a pydantic model into a structural schema as the API server wants it.

Called by crd. What pydantic writes and a CRD may not contain is rewritten: references are inlined,
`X or null` becomes an optional X, exclusive bounds become flags, free objects keep their fields.
"""

from __future__ import annotations

import copy
from typing import Any

from pydantic import BaseModel

Object = dict[str, Any]

_DROPPED = ("title", "additionalProperties", "discriminator", "$defs", "examples")


def structural(model: type[BaseModel]) -> Object:
    """The schema of a model, without references."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(raw, raw.get("$defs", {}))


def _convert(node: Object, definitions: Object) -> Object:
    node = _inlined(node, definitions)
    result: Object = {key: value for key, value in node.items() if key not in _DROPPED}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "const" in result:
        result["enum"] = [result.pop("const")]
    for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if flag in result:
            result[bound] = result.pop(flag)
            result[flag] = True
    if result.get("type") == "integer":
        small = abs(result.get("maximum", 2**63)) < 2**31
        result["format"] = "int32" if small else "int64"
    if "items" in result:
        result["items"] = _without_defaults(_convert(result["items"], definitions))
    if "properties" in result:
        fields = {name: _convert(part, definitions) for name, part in node["properties"].items()}
        result["properties"] = fields
        for name, field in fields.items():
            # else the defaults inside would not reach a job that leaves the object out; they are
            # written out, since the server checks rules against the default as it stands
            if name not in node.get("required", []) and (filled := _filled(field)):
                field["default"] = filled
    elif result.get("type") == "object":
        _free_object(result, node.get("additionalProperties", True), definitions)
    if result.get("default", 0) in (None, ""):
        del result["default"]
    return result


def _without_defaults(item: Object) -> Object:
    """An entry of a list, as its author wrote it.

    Tools that compare what is applied with what is there compare a list whole, so one field that
    the server fills in would make every list differ from its source for ever.
    """
    fields = {
        name: _without_defaults(each) if isinstance(each, dict) else each
        for name, each in item.items()
        if name != "default"
    }
    if "properties" in item:
        properties = item["properties"].items()
        fields["properties"] = {name: _without_defaults(each) for name, each in properties}
    return fields


def _inlined(node: Object, definitions: Object) -> Object:
    """Follow a reference, and take the one alternative of `X or null`."""
    node = copy.copy(node)
    if "$ref" in node:
        target = definitions[node.pop("$ref").rsplit("/", 1)[1]]
        return _inlined({**target, **node}, definitions)
    if "anyOf" in node:
        alternatives = [part for part in node.pop("anyOf") if part.get("type") != "null"]
        assert len(alternatives) == 1, f"no structural schema for {alternatives}"
        return _inlined({**alternatives[0], **node}, definitions)
    return node


def _free_object(result: Object, values: Any, definitions: Object) -> None:
    """A map: of one type of values, or of anything."""
    if isinstance(values, dict) and values:
        result["additionalProperties"] = _convert(values, definitions)
    else:
        result["x-kubernetes-preserve-unknown-fields"] = True
    result.pop("propertyNames", None)


def _filled(schema: Object) -> Object:
    """What an absent object gets by its fields' defaults; nothing if it has required fields."""
    if "required" in schema:
        return {}
    fields = schema.get("properties", {}).items()
    return {name: field["default"] for name, field in fields if "default" in field}

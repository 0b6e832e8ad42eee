"""Fields of an OSFTJob that this version does not know, because its definition is newer.

Called by definition, and by decide for its words. The API server puts a new field's default into
every job, also into those whose authors have never heard of it; such a field changes nothing, since
its default means what was done before there was one. Pure; must never take away what an author set.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from osft_operator.spec import JobSpec, model_in

Object = Mapping[str, Any]
Path = tuple[str | int, ...]
"""Where a field is: names, and numbers of list entries."""


def unknown_fields(body: Object) -> list[Path]:
    """Every field of the spec that no model has; none for what is no object."""
    return _unknown(body.get("spec"), JobSpec, ("spec",))


def shown(path: Path) -> str:
    """A path as people write it."""
    return ".".join(map(str, path))


def without_defaults(body: Object, paths: Sequence[Path], schema: Object) -> tuple[Object, Object]:
    """The job without those of its fields that have the definition's default.

    Args:
        body: the OSFTJob; it is not changed.
        paths: the fields, as `unknown_fields` found them.
        schema: of the whole object; empty when it is not known.

    Returns:
        The job, and what was left out, by its path in words.
    """
    left_out = {}
    for path in paths:
        value = _at(body, path)
        if value == _default(schema, path):
            body = _removed(body, path)
            left_out[shown(path)] = value
    return body, left_out


def _unknown(part: Any, model: type[BaseModel], path: Path) -> list[Path]:
    if isinstance(part, list):
        entries = enumerate(part)
        return [each for index, entry in entries for each in _unknown(entry, model, (*path, index))]
    if not isinstance(part, Mapping):
        return []
    found: list[Path] = []
    fields = _fields(model)
    for name, value in part.items():
        if name not in fields:
            found.append((*path, name))
        elif (inner := fields[name]) is not None:
            found += _unknown(value, inner, (*path, name))
    return found


@functools.cache
def _fields(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """A model's fields by their names in YAML, each with the model inside of it."""
    return {to_camel(name): model_in(info.annotation) for name, info in model.model_fields.items()}


_NOTHING = object()


def _default(schema: Object, path: Path) -> Any:
    for part in path:
        inner = schema.get("items") if isinstance(part, int) else None
        schema = inner or (schema.get("properties") or {}).get(part) or {}
    return schema.get("default", _NOTHING)


def _at(body: Any, path: Path) -> Any:
    for part in path:
        body = body[part]
    return body


def _removed(body: Any, path: Path) -> Any:
    """A copy without one field; what is beside the way is shared."""
    first, *rest = path
    if not rest:
        return {name: value for name, value in body.items() if name != first}
    copied: Any = list(body) if isinstance(body, list) else dict(body)
    copied[first] = _removed(body[first], tuple(rest))
    return copied

"""CONTRACT: what all parameters have in common: names, texts, and how strict a group of them is.

`config` makes the trainer's parameters of it, the operator the parts of an OSFTJob's spec. Must
never import torch, transformers, kopf or kubernetes.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

WHITE_SPACE = r"\t\n\v\f\r \x85\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Inside a class of a regular expression: what Unicode calls so, and pydantic strips.

Spelt out, since the API server, Python and editors each mean something else by `\\s`; the later
ones as they are, since no spelling of them means the same to all four engines.
"""
TEXT_PATTERN = rf"^[^{WHITE_SPACE}]([\s\S]*[^{WHITE_SPACE}])?$"
"""Not blank, and nothing at its ends to strip."""
Text = Annotated[str, Field(min_length=1, pattern=TEXT_PATTERN)]
"""A text that says something."""


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_PATH_IN_PYTHON = BeforeValidator(_as_text)
Path = Annotated[Text, Field(max_length=1024), _PATH_IN_PYTHON]
"""A path as the trainer's process sees it; in Python pathlib's, too."""


FROM_TEXT = {"from_text": True}
"""Validation context of values that are all texts, as on a command line."""


class Parameters(BaseModel):
    """Frozen, strict about names and kinds, camelCase in YAML and snake_case in Python."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        str_strip_whitespace=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _suggest_names(cls, data: Any) -> Any:
        """Name the nearest field for each unknown one, before pydantic's plain refusal."""
        if not isinstance(data, dict):
            return data
        known = [name for field in cls.model_fields for name in (field, to_camel(field))]
        unknown = [str(name) for name in data if str(name) not in known]
        if unknown:
            raise ValueError("; ".join(unknown_name(name, known) for name in unknown))
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_other_kinds(cls, value: Any, info: ValidationInfo) -> Any:
        """True is no 1 and 1 no true: whoever wrote it may have meant another field.

        On command lines all is text. A text may be a number anywhere: YAML reads 5e-6 as one.
        """
        if (info.context or {}).get("from_text") or info.field_name is None:
            return value
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if bool in kinds:
            if kinds == {bool} and not isinstance(value, bool):
                raise ValueError("must be true or false, without quotes")
            return value
        if kinds & {int, float} and isinstance(value, bool):
            raise ValueError(f"must be a number, and {str(value).lower()} is none: give a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field's annotation names, None left out."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for each in get_args(annotation) for kind in _kinds(each)}
    return set() if annotation is type(None) else {get_origin(annotation) or annotation}


def unknown_name(name: str, known: list[str]) -> str:
    """Say that a name is unknown and which known one is nearest."""
    # `batch_size` means effective_batch_size, though block_size is nearer by its letters.
    longer = [each for each in known if name.lower() in each.lower()]
    nearest = difflib.get_close_matches(name, longer or known, n=1, cutoff=0.5)
    cure = f"did you mean {nearest[0]!r}?" if nearest else "see `osft-train --help`"
    return f"unknown parameter {name!r}; {cure}"


def at_home(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Values of a model's fields, by either of their names, with `~` in paths taken for the home.

    For whoever reads what a user of this machine has written; a pod's paths are the pod's business.
    """
    names = path_fields(model)
    found = dict(values)
    for name in names & found.keys():
        value = _as_text(found[name])
        found[name] = os.path.expanduser(value) if isinstance(value, str) else value
    return found


@functools.cache
def path_fields(model: type[BaseModel]) -> frozenset[str]:
    """The fields that are paths, in snake_case and in camelCase."""
    hints = get_type_hints(model, include_extras=True)
    names = [name for name in model.model_fields if _holds_path(hints[name])]
    return frozenset({*names, *map(to_camel, names)})


def _holds_path(hint: Any) -> bool:
    return hint is _PATH_IN_PYTHON or any(map(_holds_path, get_args(hint)))

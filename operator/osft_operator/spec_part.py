"""What all parts of an OSFTJob's spec have in common: strict types, camelCase names only.

Base of the models in spec, spec_storage and spec_pod. The API server has checked most of this
already; `osft validate` and a server without the CRD's rules have not. Reads as the server reads:
null is absent, 1e6 is an integer. One thing more: 5e-6 as text is a number, as PyYAML reads it.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

from osft_operator.resources import (
    COUNTED_PATTERN,
    COUNTED_WORDS,
    QUANTITY_PATTERN,
    is_counted,
)
from osft_trainer.parameters import TEXT_PATTERN, WHITE_SPACE, Parameters, Text

ABSOLUTE_PATH_PATTERN = rf"^(/[^/:]+)*/[^/:]*[^/:{WHITE_SPACE}]$"
DNS_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
LABEL_VALUE_PATTERN = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"

KEY_PATTERN = r"^[-._a-zA-Z0-9]+$"

PATTERN_WORDS = {
    QUANTITY_PATTERN: "must be a quantity, for instance 100Gi, 4 or 500m",
    COUNTED_PATTERN: "must be a quantity below 8E, for instance 100Gi, 4 or 500m",
    ABSOLUTE_PATH_PATTERN: "must be an absolute path without `:`, a last `/` or white space at its "
    "end, for instance /data",
    TEXT_PATTERN: "must not be blank, nor begin or end with white space",
    DNS_NAME_PATTERN: "must be the name of an object: lower case letters, digits, `-` and `.`",
    LABEL_VALUE_PATTERN: "must be letters, digits, `-`, `_`, `.`, at both ends a letter or digit",
    KEY_PATTERN: "must be a key: letters, digits, `-`, `_` and `.`",
}
"""What each pattern asks for, for people."""


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _counted(text: str) -> str:
    if not is_counted(text):
        raise ValueError(COUNTED_WORDS)
    return text


Quantity = Annotated[
    str,
    Field(min_length=1, max_length=32, pattern=QUANTITY_PATTERN),
    AfterValidator(_counted),
]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_NAME_PATTERN)]
AbsolutePath = Annotated[str, Field(min_length=2, max_length=512, pattern=ABSOLUTE_PATH_PATTERN)]
SubPath = Annotated[Text, Field(max_length=512)]
ResourceQuantity = Annotated[
    str,
    Field(min_length=1, max_length=32, pattern=COUNTED_PATTERN),
    BeforeValidator(_as_text),
    # all in the pattern: of a number or text, rules cost too much before Kubernetes 1.34
    WithJsonSchema(
        {"x-kubernetes-int-or-string": True, "maxLength": 32, "pattern": COUNTED_PATTERN}
    ),
]
KeyName = Annotated[str, Field(min_length=1, max_length=253, pattern=KEY_PATTERN)]

_EXPONENT = re.compile(r"[-+]?[0-9]*\.?[0-9]+[eE][-+]?[0-9]+\Z")


class JobPart(Parameters):
    """One object of the spec."""

    model_config = ConfigDict(
        strict=True,
        validate_by_name=False,
        validate_by_alias=True,
        # the API server strips nothing, and what it stores is what there is
        str_strip_whitespace=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _suggest_names(cls, data: Any) -> Any:
        """Read null and numbers as the API server does. Unknown names: see spec.problems."""
        if not isinstance(data, dict):
            return data
        kinds = _annotations(cls)
        return {
            name: _number(value, kinds.get(name, ""))
            for name, value in data.items()
            if value is not None
        }


@functools.cache
def _annotations(model: type[BaseModel]) -> dict[str, str]:
    """The types of a model's fields in words, by alias; making the words is slow."""
    return {to_camel(name): str(info.annotation) for name, info in model.model_fields.items()}


def _number(value: Any, annotation: str) -> Any:
    if isinstance(value, str) and "float" in annotation and _EXPONENT.match(value):
        return float(value)
    if isinstance(value, float) and "int" in annotation and value.is_integer():
        return int(value)
    return value


def is_below(path: str, parent: str) -> bool:
    """Whether an absolute path is a folder below another, without `..` on the way."""
    parts, above = path.rstrip("/").split("/"), parent.rstrip("/").split("/")
    return ".." not in parts and len(parts) > len(above) and parts[: len(above)] == above


def has_parent_step(path: str) -> bool:
    """Whether a path contains `..` as a step."""
    return ".." in path.split("/")

"""CONTRACT: the parameters as command line arguments and back, and refusals in words.

Called by the operator's render (for_any_version) and by the launcher and each rank (from_argv).
What is written here is read back equal. Operator and trainer image may be of different versions, so
what is at its default goes another way, on which a parameter that the image does not know is no
error. Must never import torch, transformers, kopf or kubernetes.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from osft_trainer.config import (
    LaunchParameters,
    RunParameters,
    TrainingParameters,
)
from osft_trainer.parameters import FROM_TEXT, at_home, unknown_name

DEFAULTS_ENV = "OSFT_DEFAULTS"
"""Environment variable with the parameters that are at their default: one JSON object by name.

An image that does not know the variable, or a name in it, goes on with its own defaults: that of a
parameter which is added later must mean what was done before there was one.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerArguments:
    """Everything one trainer process is told."""

    training: TrainingParameters
    run: RunParameters = field(default_factory=RunParameters)
    launch: LaunchParameters = field(default_factory=LaunchParameters)

    def to_argv(self) -> list[str]:
        """Explicit `--name=value` arguments for every parameter that is set."""
        return [
            argument
            for part in (self.training, self.run, self.launch)
            for argument in to_argv(part)
        ]

    def for_any_version(self) -> tuple[list[str], str]:
        """The same for an image of another version.

        Returns:
            Arguments for what is not at its default, and the value of DEFAULTS_ENV for the rest.
        """
        argv: list[str] = []
        defaults: dict[str, Any] = {}
        for part in (self.training, self.run, self.launch):
            given = part.model_dump(mode="python", exclude_defaults=True)
            argv += _flags(given)
            defaults |= {
                name: value
                for name, value in part.model_dump(mode="json").items()
                if name not in given and value is not None and value != {}
            }
        return argv, json.dumps(defaults)


def to_argv(parameters: BaseModel) -> list[str]:
    """Write each field that is not None as `--name=value`; lists repeat the flag."""
    return _flags(parameters.model_dump(mode="python"))


def _flags(values_by_name: Mapping[str, Any]) -> list[str]:
    argv = []
    for name, value in values_by_name.items():
        values = value if isinstance(value, list) else [value]
        flag = "--" + name.replace("_", "-")
        argv += [f"{flag}={_text(item)}" for item in values if item is not None and item != {}]
    return argv


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return repr(value) if isinstance(value, float) else str(value)


def from_argv(
    argv: Sequence[str], *, defaults: str = "", program: str = "osft-train"
) -> TrainerArguments:
    """Read what to_argv writes. A wrong argument ends the process with exit code 2 and its name.

    Args:
        argv: the arguments.
        defaults: the value of DEFAULTS_ENV; an argument wins over it.
        program: its name in refusals.

    Raises:
        ValueError: one line per problem, each with parameter, value, rule and cure.
    """
    parser = _parser(program)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value != []}
    given = {**_known(defaults), **given}
    parts: list[BaseModel] = []
    problems: list[str] = []
    for model in (TrainingParameters, RunParameters, LaunchParameters):
        values = {name: value for name, value in given.items() if name in model.model_fields}
        try:
            parts.append(model.model_validate(at_home(values, model), context=FROM_TEXT))
        except ValidationError as error:
            problems += explain(error)
    if problems:
        raise ValueError("\n".join(problems))
    training, run, launch = parts
    assert isinstance(training, TrainingParameters)
    assert isinstance(run, RunParameters)
    assert isinstance(launch, LaunchParameters)
    return TrainerArguments(training, run, launch)


def _known(defaults: str) -> dict[str, Any]:
    """What this version knows of the parameters at their default; the rest is named in the log."""
    try:
        found = json.loads(defaults) if defaults else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{DEFAULTS_ENV}: no JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{DEFAULTS_ENV}: no JSON object (got {defaults!r})")
    models = (TrainingParameters, RunParameters, LaunchParameters)
    known = {name for model in models for name in model.model_fields}
    if unknown := sorted(found.keys() - known):
        logger.warning(
            "not known to this version of the trainer, at its default and so passed over: %s",
            ", ".join(f"{name} ({found[name]!r})" for name in unknown),
        )
    return {name: value for name, value in found.items() if name in known}


def explain(error: ValidationError, prefix: str = "", camel: bool = False) -> list[str]:
    """Turn pydantic's errors into lines `field: value: rule`, in YAML or in Python names.

    Args:
        error: what model_validate raised.
        prefix: path of the model inside the document, for instance "spec".
        camel: keep the names as given (YAML); else use the Python names.
    """
    lines = []
    for item in error.errors(include_url=False):
        names = [str(part) if camel else _snake(str(part)) for part in item["loc"]]
        where = ".".join(([prefix] if prefix else []) + names)
        rule = item["msg"].removeprefix("Value error, ")
        rule = _camel_names(rule) if camel else rule
        value = "" if isinstance(item["input"], (dict, BaseModel)) else f" (got {item['input']!r})"
        if item["type"] == "missing":
            rule, value = "is required: set it", ""
        lines.append(f"{where}: {rule}{value}" if where else f"{rule}{value}")
    return lines


def _snake(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name)


def _camel_names(text: str) -> str:
    """Spell the parameters named in a rule as YAML does."""
    return re.sub(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", _camel_if_known, text)


def _camel_if_known(match: re.Match[str]) -> str:
    known = {**TrainingParameters.model_fields, **RunParameters.model_fields}
    return to_camel(match[0]) if match[0] in known else match[0]


class _Parser(argparse.ArgumentParser):
    """argparse whose refusal of an unknown flag names the nearest one, and that keeps any value."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Python 3.11 takes the value of `--name=--` for the mark behind which no flags follow.
        if action.option_strings and arg_strings == ["--"]:
            return "--"
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            known = [flag for action in self._actions for flag in action.option_strings]
            flag = message.removeprefix(prefix).split()[0].split("=")[0]
            message = unknown_name(flag, known)
        super().error(message)


class _JSON(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            setattr(namespace, self.dest, json.loads(values))
        except json.JSONDecodeError as error:
            parser.error(f"{option_string}: {values!r} is not a JSON object: {error}")


def _parser(program: str) -> argparse.ArgumentParser:
    """One flag per field, its docstring as help. Values stay strings: pydantic converts them."""
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a model by OSFT under torchrun. Reads PET_* from the environment.",
    )
    for model in (TrainingParameters, RunParameters, LaunchParameters):
        group = parser.add_argument_group(model.__name__, (model.__doc__ or "").strip())
        for name, info in model.model_fields.items():
            _add_flag(group, name, str(info.annotation), _help(info))
    return parser


def _add_flag(group: Any, name: str, annotation: str, text: str) -> None:
    options: dict[str, Any] = {"help": text, "metavar": "VALUE"}
    if "list[" in annotation:
        options["action"] = "append"
    elif "dict[" in annotation:
        options["action"] = _JSON
    group.add_argument("--" + name.replace("_", "-"), **options)


def _help(info: Any) -> str:
    text = " ".join((info.description or "").split()).replace("%", "%%")
    if info.is_required():
        return f"{text} Required."
    default = info.get_default(call_default_factory=True)
    return text if default is None or default == {} else f"{text} Default: {_text(default)}."


def describe(models: Iterable[type[BaseModel]]) -> list[tuple[str, str, str]]:
    """Rows (name, default, meaning) of all parameters, for the README's table."""
    rows = []
    for model in models:
        for name, info in model.model_fields.items():
            default = info.get_default(call_default_factory=True)
            shown = "required" if info.is_required() else "" if default is None else _text(default)
            rows.append((name, shown, " ".join((info.description or "").split())))
    return rows

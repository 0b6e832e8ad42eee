"""CONTRACT: the parameters as command line arguments and back, and refusals in words.

Called by the operator's render (to_argv) and by the launcher and each rank (from_argv). What
to_argv writes, from_argv reads back equal. Must never import torch, transformers, kopf or
kubernetes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from osft_trainer.config import (
    LaunchParameters,
    RunParameters,
    TrainingParameters,
)
from osft_trainer.parameters import unknown_name


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


def to_argv(parameters: BaseModel) -> list[str]:
    """Write each field that is not None as `--name=value`; lists repeat the flag."""
    argv = []
    for name, value in parameters.model_dump(mode="python").items():
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


def from_argv(argv: Sequence[str], *, program: str = "osft-train") -> TrainerArguments:
    """Read what to_argv writes. A wrong argument ends the process with exit code 2 and its name.

    Raises:
        ValueError: one line per problem, each with parameter, value, rule and cure.
    """
    parser = _parser(program)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value != []}
    parts: list[BaseModel] = []
    problems: list[str] = []
    for model in (TrainingParameters, RunParameters, LaunchParameters):
        values = {name: value for name, value in given.items() if name in model.model_fields}
        try:
            parts.append(model.model_validate(values))
        except ValidationError as error:
            problems += explain(error)
    if problems:
        raise ValueError("\n".join(problems))
    training, run, launch = parts
    assert isinstance(training, TrainingParameters)
    assert isinstance(run, RunParameters)
    assert isinstance(launch, LaunchParameters)
    return TrainerArguments(training, run, launch)


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

"""What a row of chat data must hold: a row in, a checked conversation out, or the reason why not.

Lives here: roles, messages, thoughts, weights, tools, arguments of the chat template. Called by
`samples`. Must never: guess what a malformed row meant, read files, or know any chat template.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from osft_trainer.features import objects_of_lists

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates know."""

INSTRUCTING_ROLES = ("system", "developer")
"""Their words are never trained."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message carries the assistant's thoughts."""

ROW_KEYS = frozenset({"messages", "tools", "unmask", "chat_template_kwargs"})
"""What is read of a row."""

MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "weight", *THOUGHTS})
"""What is read of a message; its other keys are for the chat template."""


@dataclass(frozen=True)
class Conversation:
    """One checked row."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    unmask: bool
    """Whether every turn but the system's carries loss."""
    without_loss: frozenset[int] = frozenset()
    """Positions of messages with weight 0: they are read and not learned."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template (`chat_template_kwargs`), for this row."""


def conversation(row: Any) -> Conversation:
    """Check a row.

    `messages`, `tools`, `tool_calls` and `chat_template_kwargs` may be JSON in a string, as tables
    carry them; a blank one of the last three is what a column of text holds for none. Keys of a
    message whose value is null or empty are left out: templates ask whether a key is there.

    Raises:
        ValueError: it holds no conversation to learn from; says why.
    """
    row = as_object(row, "'messages'")
    if "messages" not in row:
        raise ValueError(f"has no 'messages'{keys_of(row)}{_other_form(row)}")
    unmask = row.get("unmask") or False
    if not isinstance(unmask, bool):
        raise ValueError(f"'unmask' must be true or false, is {kind_of(unmask)}")
    messages = _parsed(row["messages"], "messages")
    if isinstance(messages, dict):
        # Some writers of columns keep a list of objects as an object of lists.
        messages = objects_of_lists(messages) or messages
    if not isinstance(messages, list):
        raise ValueError(f"'messages' must be a list, is {kind_of(messages)}")
    if not messages:
        raise ValueError("'messages' is empty")
    checked = [_message(each, f"message {number}") for number, each in enumerate(messages, start=1)]
    roles = {message["role"] for message in checked}
    if unmask and roles <= set(INSTRUCTING_ROLES):
        raise ValueError("has only system turns, so there is nothing to learn")
    if not unmask and "assistant" not in roles:
        raise ValueError("has no assistant turn, so there is nothing to learn")
    weights = [message.pop("weight", 1) for message in checked]
    return Conversation(
        checked,
        _tools(_optional(row.get("tools"), "tools")),
        unmask,
        frozenset(place for place, weight in enumerate(weights) if weight == 0),
        _template_arguments(_optional(row.get("chat_template_kwargs"), "chat_template_kwargs")),
    )


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(
            f"{name} must be an object with 'role' and 'content', is {kind_of(message)}"
        )
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name} has the unknown role {role!r}: use one of {', '.join(ROLES)}")
    name = f"{name} ({role})"
    content = _joined(message.get("content"), name)
    calls = _calls(message.get("tool_calls"), role, name)
    if content is None and calls:
        content = ""  # both spellings of a bare call are in use; templates expect text to be there
    if not isinstance(content, str):
        raise ValueError(f"{name}: 'content' must be a string, is {kind_of(content)}")
    others = {key: value for key, value in message.items() if value not in (None, "", [])}
    others.pop("tool_calls", None)  # a blank string of none is no value of its own
    checked = {**others, "role": role, "content": content}
    if calls:
        checked["tool_calls"] = calls
    thoughts = [key for key in THOUGHTS if key in checked]
    if len({str(checked[key]) for key in thoughts}) > 1:
        raise ValueError(f"{name}: {' and '.join(thoughts)} differ: give one of them")
    for key in thoughts:
        if not isinstance(checked[key], str):
            raise ValueError(f"{name}: {key!r} must be a string, is {kind_of(checked[key])}")
    _check_weight(checked, name)
    _check_characters(checked, name)
    return checked


def _joined(content: Any, name: str) -> Any:
    """The content; a list of text parts as one string, a line each, as servers join them."""
    if not isinstance(content, list) or not content:
        return content
    for number, part in enumerate(content, start=1):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(
                f"{name}: part {number} of 'content' is {repr(kind) if kind else kind_of(part)}: "
                'only text is trained, so give parts as {"type": "text", "text": "..."}, thoughts '
                "in 'reasoning_content', and leave images and sound out"
            )
    return "\n".join(part["text"] for part in content)


def _check_weight(message: Mapping[str, Any], name: str) -> None:
    weight = message.get("weight", 1)
    # true is 1 for Python, and neither is a share of the loss.
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"{name}: 'weight' must be 1 (learned as usual) or 0 (read and not learned), is "
            f"{weight!r}"
        )


def _template_arguments(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"'chat_template_kwargs' must be an object, is {kind_of(given)}")
    return given


def _calls(calls: Any, role: str, name: str) -> list[dict[str, Any]] | None:
    calls = _optional(calls, "tool_calls")
    if calls is None or calls == []:
        return None
    if role != "assistant":
        raise ValueError(f"{name}: only an assistant has 'tool_calls'")
    if not isinstance(calls, list):
        raise ValueError(f"{name}: 'tool_calls' must be a list, is {kind_of(calls)}")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{name}: each of 'tool_calls' must be an object with the name of a function"
            )
    return calls


def _check_characters(message: Mapping[str, Any], name: str) -> None:
    for key, value in message.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: {key!r} holds half a character") from error


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError("'tools' must be a list of objects")
    parsed = [_parsed(tool, "tools") for tool in tools]
    if not all(isinstance(tool, dict) for tool in parsed):
        raise ValueError("'tools' must be a list of objects")
    return parsed


def _optional(value: Any, key: str) -> Any:
    """As `_parsed`; None for a blank string."""
    return None if isinstance(value, str) and not value.strip() else _parsed(value, key)


def _parsed(value: Any, key: str) -> Any:
    """The value, or what the JSON in a string holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{key!r} is a string, and not of JSON: {error}") from error


def _other_form(row: Mapping[str, Any]) -> str:
    if "input_ids" in row:
        return ": set use_processed_dataset to train on token ids"
    if "document" in row or "text" in row:
        return ": set is_pretraining to train on plain documents"
    return ""


def as_object(row: Any, needs: str) -> dict[str, Any]:
    """The row, if it is a JSON object.

    Raises:
        ValueError: it is something else; `needs` says what the object shall hold.
    """
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object with {needs}, is {kind_of(row)}")
    return row


def keys_of(row: Mapping[str, Any]) -> str:
    """What the row holds instead, for the end of a message."""
    return f" (keys: {', '.join(sorted(map(repr, row))[:8]) or 'none'})"


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null or absent" if value is None else kinds.get(type(value), "a number")

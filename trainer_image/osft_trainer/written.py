"""Whether the chat template wrote what a row holds: each message's own words, where they belong.

Lives here: comparing a rendered text with the contents, thoughts, calls and further keys of the
messages. What counts is that other words would have given another text. Called by `turn_layout`,
`masking` and `samples`. Must never: change a text, or know any model family by name.

Two questions are asked. Of the form of a conversation (its roles, and which of its messages have
calls or thoughts): does each message have a place? It is answered once a form, by a rendering in
which each content is a word of its own. Of each row: are its words there? They are looked for in
the text, and only where some are missing do further renderings tell whether they decide anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from osft_trainer.chat_template import Dialogue, Message
from osft_trainer.conversations import MESSAGE_KEYS, THOUGHTS

_WORD = re.compile(r"\w+")
OTHER = "\u241f"
"""Stands for words that are put in another's place."""
_MOST_FORMS = 4096
"""Forms that are remembered; data of calls may have one a row."""

_MOST_WORDS = 8
"""Missing words of a message that are tried: each costs a rendering."""

_CURES = {
    "system": "put them into the first user turn, or use a template with system prompts",
    "developer": "give the message the role system",
    "tool": "use a template with results of tools",
    "user": "use a template that writes this turn",
}


@dataclass(frozen=True)
class Lost:
    """What of a turn's own words its text does not hold."""

    content: bool = False
    thoughts: bool = False

    def __bool__(self) -> bool:
        """Whether it is anything."""
        return self.content or self.thoughts


class Written:
    """Checks of conversations that one chat template renders."""

    def __init__(self) -> None:
        """Nothing is known of any form yet."""
        self._without_place: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._keys: set[tuple[str, str]] = set()

    def lost_of_turn(self, dialogue: Dialogue, index: int, turn: str) -> Lost:
        """What of message `index` is not in `turn`, the part of the text that is its own.

        Raises:
            ValueError: a call is not there: a turn without it would teach silence.
        """
        message = dialogue.messages[index]
        _check_calls(dialogue, index, turn)
        thoughts = "\n".join(message[key] for key in THOUGHTS if key in message)
        content = dialogue.template.content(message)
        return Lost(
            content=self._decides_nothing(dialogue, index, _left_out(content, turn)),
            thoughts=bool(_left_out(thoughts, turn)),
        )

    def check_before(self, dialogue: Dialogue, index: int, text: str) -> None:
        """See that all that is said before turn `index` is in the text before it.

        Not of earlier assistants' turns: what a template takes off them (thoughts) a server does
        not see either, and their own text was checked for itself.

        Raises:
            ValueError: a message's words are not there; names it, with the cure.
        """
        for place in self._places_missing(dialogue, index):
            raise ValueError(_refusal(dialogue.messages[place], place))
        at = 0
        for place, message in enumerate(dialogue.messages[:index]):
            words = dialogue.template.content(message).strip()
            found = text.find(words, at)
            if found >= 0:
                at = found + len(words)
            elif message["role"] != "assistant" and words not in text[:at]:
                missing = [word for word in _WORD.findall(words) if word not in text]
                if self._decides_nothing(dialogue, place, missing, before=index):
                    raise ValueError(_refusal(message, place))

    def unused_keys(self, dialogue: Dialogue) -> Iterator[tuple[str, str]]:
        """Role and name of each key that the template does not read, once a role and name."""
        for place, message in enumerate(dialogue.messages):
            for name in sorted(message.keys() - MESSAGE_KEYS):
                known = (str(message["role"]), name)
                if known not in self._keys:
                    self._keys.add(known)
                    if _is_unread(dialogue, place, name):
                        yield known

    def _places_missing(self, dialogue: Dialogue, count: int) -> tuple[int, ...]:
        """Which of the first `count` messages have no place for their content in the text."""
        form = (
            *(_form(message, dialogue.template.content) for message in dialogue.messages[:count]),
            dialogue.tools is not None,
            repr(dialogue.arguments),
        )
        if form not in self._without_place:
            if len(self._without_place) >= _MOST_FORMS:
                self._without_place.clear()
            self._without_place[form] = _without_place(dialogue, count)
        return self._without_place[form]

    def _decides_nothing(
        self, dialogue: Dialogue, index: int, missing: list[str], before: int | None = None
    ) -> bool:
        """Whether the text is the same with another word in the place of a missing one.

        One at a time, and long ones first: a missing tag may decide what the template cuts off.
        """
        message = dialogue.messages[index]
        content = dialogue.template.content(message)
        for word in sorted(set(missing), key=lambda word: (-len(word), word))[:_MOST_WORDS]:
            other = re.sub(rf"\b{re.escape(word)}\b", OTHER, content)
            changed = dialogue.template.with_content(message, other)
            count, is_prompt = (index + 1, False) if before is None else (before, True)
            if _is_same(dialogue, index, changed, count, is_prompt=is_prompt):
                return True
        return False


def _left_out(words: str, turn: str) -> list[str]:
    """Words that are not in `turn` in their order; none where all of the text is there."""
    if words.strip() in turn:
        return []
    at, missing = 0, []
    for word in _WORD.findall(words):
        found = turn.find(word, at)
        if found < 0:
            missing.append(word)
        else:
            at = found + len(word)
    return missing


def _is_same(
    dialogue: Dialogue, index: int, changed: Message, count: int, *, is_prompt: bool = False
) -> bool:
    """Whether the text of the first `count` messages does not change with message `index`."""
    messages: list[Message] = list(dialogue.messages[:count])
    messages[index] = changed
    try:
        other = dialogue.rendered(messages, add_generation_prompt=is_prompt)
        return other == (dialogue.prompt(count) if is_prompt else dialogue.upto(count))
    except ValueError:
        return False  # it refuses the other words, so it reads them


def _is_unread(dialogue: Dialogue, place: int, name: str) -> bool:
    message = {key: value for key, value in dialogue.messages[place].items() if key != name}
    return _is_same(dialogue, place, message, len(dialogue.messages))


def _form(message: Message, content: Callable[[Message], str]) -> tuple[Any, ...]:
    calls = len(message.get("tool_calls", ()))
    return (message["role"], bool(content(message).strip()), calls, *sorted(message))


def _without_place(dialogue: Dialogue, count: int) -> tuple[int, ...]:
    """Render the first messages with a word of its own for each content; see which are missing."""
    marked: list[Message] = []
    marks: dict[int, str] = {}
    for place, message in enumerate(dialogue.messages[:count]):
        if message["role"] != "assistant" and dialogue.template.content(message).strip():
            marks[place] = f"OSFTWORD{place}X"
            message = dialogue.template.with_content(message, marks[place])
        marked.append(message)
    try:
        text = dialogue.rendered(marked, add_generation_prompt=True)
    except ValueError:
        return ()  # it reads what is in them; each row's own text is compared all the same
    return tuple(place for place, mark in marks.items() if mark not in text)


def _check_calls(dialogue: Dialogue, index: int, turn: str) -> None:
    counted: dict[str, int] = {}
    for call in dialogue.messages[index].get("tool_calls", ()):
        function = call.get("function", call)
        name = function["name"]
        counted[name] = counted.get(name, 0) + 1
        if turn.count(name) < counted[name]:
            raise ValueError(
                f"message {index + 1} calls {name!r}, which the chat template does not write: "
                "use a template with tool calls, and one call a turn if it knows no more"
            )
        for text in _texts_in(function.get("arguments")):
            spellings = (text, json.dumps(text))
            if not any(all(word in turn for word in _WORD.findall(each)) for each in spellings):
                raise ValueError(
                    f"message {index + 1} calls {name!r} with {text[:80]!r}, which the chat "
                    "template does not write: use a template that writes the arguments of calls"
                )


def _texts_in(value: Any) -> Iterator[str]:
    """Keys and strings of a call's arguments; of JSON text the text itself."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)


def _refusal(message: Message, place: int) -> str:
    role = message["role"]
    return (
        f"message {place + 1} ({role}): the chat template leaves words of its content out, so the "
        f"model would not read them: {_CURES[role]}"
    )

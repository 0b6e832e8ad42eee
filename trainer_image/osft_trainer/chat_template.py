"""Rendering conversations with a tokenizer's own chat template, in the form that it expects.

Lives here: finding out by trial how a template wants content, thoughts and the arguments of calls,
giving them to it so, its refusals in words, and one conversation's renderings (`Dialogue`). Called
by `masking`, `turn_ends`, `written` and `self_sampling`. Must never: add text that the template did
not write, or know any model family by name.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from osft_trainer.conversations import THOUGHTS

Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]] | None

_MARKS = ("\u241f", "\u241e", "\u241d")
"""Characters that stand for other words: one more than a message has texts."""

ASKED: Message = {"role": "user", "content": "probe"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {}},
    },
}
_CALL = {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}
_CALL_AS_TEXT = {**_CALL, "arguments": json.dumps(_CALL["arguments"])}


class ChatTemplate:
    """One tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has none, or it writes no message text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out once what the template expects."""
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: use an instruct model, or put a "
                "chat_template.jinja beside its tokenizer.json"
            )
        self._tokenizer = tokenizer
        self.source = str(tokenizer.chat_template)
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        self._taken = {"messages", "self", *own}
        self._content_as_parts = self._wants_parts()
        self._arguments_as_text = self._wants_text()
        self.thoughts = self._thoughts()
        """Under which name the template looks for the assistant's thoughts; None: nowhere."""
        self.writes_tools = self._shows_tools()
        self.generation_prompt = self._generation_prompt()
        """What it writes where the assistant shall begin; empty: nothing."""
        self.conversation = self._conversation()
        """A probe of three turns, user to user; of four, where the user must not be the last."""

    def adapted(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages as this template reads them; for `render`, and once a conversation."""
        return [self._adapted(message) for message in messages]

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """See that a row's own arguments of the template take none of the trainer's places.

        Raises:
            ValueError: one does; names it.
        """
        for name in arguments:
            if name in self._taken:
                raise ValueError(
                    f"'chat_template_kwargs' holds {name!r}, which is not the chat template's: "
                    "remove it"
                )

    def names(self, word: str) -> bool:
        """Whether the template's source has this word, so that it may use what is called so."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    def content(self, message: Message) -> str:
        """The content of an adapted message."""
        content = message["content"]
        return str(content[0]["text"] if self._content_as_parts else content)

    def with_content(self, message: Message, content: str) -> dict[str, Any]:
        """An adapted message with another content."""
        changed = [{"type": "text", "text": content}] if self._content_as_parts else content
        return {**message, "content": changed}

    def with_other_words(self, message: Message) -> dict[str, Any]:
        """An adapted message with other words in the place of its own, thoughts, calls and all.

        They differ from its own in the first character.
        """
        thoughts = [key for key in THOUGHTS if key in message]
        texts = (self.content(message), *(message[key] for key in thoughts))
        firsts = {text.strip()[:1] for text in texts}
        words = next(mark for mark in _MARKS if mark not in firsts)
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return self.with_content({**kept, **dict.fromkeys(thoughts, words)}, words)

    def render(
        self,
        messages: Messages,
        tools: Tools,
        arguments: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of adapted messages.

        Raises:
            ValueError: the template refuses them; with its words.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(arguments or {}),
            )
        # Templates are programs: a missing key or a wrong type shows up as any of these.
        except (TemplateError, TypeError, ValueError, LookupError, RecursionError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return _whole_characters(str(rendered))

    def prompted(self, messages: Messages) -> str:
        """What a server gives the model after adapted messages; raises as `render`."""
        return self.render(messages, None, add_generation_prompt=True)

    def _adapted(self, message: Message) -> dict[str, Any]:
        changed = dict(message)
        if self._content_as_parts:
            changed["content"] = [{"type": "text", "text": message.get("content") or ""}]
        thoughts = next((changed.pop(name) for name in THOUGHTS if name in message), None)
        if thoughts is not None:
            for name in THOUGHTS:
                changed.pop(name, None)
            changed[self.thoughts or THOUGHTS[0]] = thoughts
        if "tool_calls" in message:
            changed["tool_calls"] = [self._adapted_call(call) for call in message["tool_calls"]]
        return changed

    def _adapted_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A call with its arguments as an object or as JSON text; both spellings are in use."""
        if "function" in call:
            return {**call, "function": self._adapted_call(call["function"])}
        arguments = call.get("arguments")
        if self._arguments_as_text and isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self._arguments_as_text and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments or "{}")
            except (json.JSONDecodeError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        return {**call, "arguments": arguments}

    def _wants_parts(self) -> bool:
        """Whether the template wants content as a list of parts, as image models' templates do."""
        refused = False
        for as_parts in (False, True):
            self._content_as_parts = as_parts
            content = [{"type": "text", "text": "probe"}] if as_parts else "probe"
            try:
                if "probe" in self.render([{**ASKED, "content": content}], None):
                    return as_parts
            except ValueError:  # perhaps it wants more than one message: each will speak for itself
                refused = refused or not as_parts
        if not refused:
            raise ValueError("the tokenizer's chat template leaves the messages' words out: fix it")
        return False

    def _wants_text(self) -> bool:
        """Whether it writes the arguments of a call as they come, so that they must be JSON text.

        The other templates turn an object into JSON themselves, and would quote a text once more.
        """
        as_object = self._tried(_CALL)
        if "probe_value" in as_object and "{'probe_key'" not in as_object:
            return False
        return "probe_value" in self._tried(_CALL_AS_TEXT)

    def _thoughts(self) -> str | None:
        """The name under which it finds thoughts; some templates show those of calls only."""
        call = _CALL_AS_TEXT if self._arguments_as_text else _CALL
        for name in THOUGHTS:
            for tried in (None, call):
                if "probe_thought" in self._tried(tried, **{name: "probe_thought"}):
                    return name
        return None

    def _shows_tools(self) -> bool:
        """Whether it tells the model of its tools; some do it in a system turn only."""
        return "probe_tool" in self.tried([ASKED], [_TOOL]) or "probe_tool" in self.tried(
            [{"role": "system", "content": "probe"}, ASKED], [_TOOL]
        )

    def _generation_prompt(self) -> str:
        try:
            asked = self.adapted([ASKED])
            prompt = self.render(asked, None, add_generation_prompt=True)
            return prompt[common_prefix_length(prompt, self.render(asked, None)) :]
        except ValueError:
            return ""

    def _conversation(self) -> str:
        answered = [ASKED, {"role": "assistant", "content": "yes"}]
        return self.tried([*answered, ASKED], None) or self.tried(answered * 2, None)

    def _tried(self, call: Mapping[str, Any] | None, **more: str) -> str:
        """A short conversation with an answer or a call; empty when the template refuses it."""
        content = "" if call else "yes"
        answer: dict[str, Any] = {"role": "assistant", "content": content, **more}
        if self._content_as_parts:
            answer["content"] = [{"type": "text", "text": content}]
        if call:
            answer["tool_calls"] = [{"type": "function", "id": "probe0001", "function": call}]
        try:
            return self.render([*self.adapted([ASKED]), answer], None)
        except ValueError:
            return ""

    def tried(self, messages: Messages, tools: Tools = None) -> str:
        """The text of messages as rows hold them; empty when the template refuses them."""
        try:
            return self.render(self.adapted(messages), tools)
        except ValueError:
            return ""


class Dialogue:
    """One conversation with the template's renderings of its beginnings, each made once."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Messages,
        tools: Tools = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`messages` as a row holds them; `arguments`: its own for the template.

        Raises:
            ValueError: one of the arguments is not the template's.
        """
        template.check_arguments(arguments or {})
        self.template = template
        self.messages = template.adapted(messages)
        self.tools = tools
        self.arguments = dict(arguments or {})
        self._texts: dict[tuple[int, bool], str] = {}

    def upto(self, count: int) -> str:
        """The first `count` messages.

        Raises:
            ValueError: the template refuses them; with its words.
        """
        return self._beginning(count, add_generation_prompt=False)

    def prompt(self, count: int) -> str:
        """What a server gives the model after the first `count` messages; raises as `upto`."""
        return self._beginning(count, add_generation_prompt=True)

    def rendered(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Adapted messages with this conversation's tools and arguments; raises as `upto`."""
        return self.template.render(
            messages, self.tools, self.arguments, add_generation_prompt=add_generation_prompt
        )

    def with_other_words(self, index: int) -> str:
        """The text up to and with message `index`, which has other words; raises as `upto`."""
        changed = self.template.with_other_words(self.messages[index])
        return self.rendered([*self.messages[:index], changed])

    def _beginning(self, count: int, *, add_generation_prompt: bool) -> str:
        key = (count, add_generation_prompt)
        if key not in self._texts:
            self._texts[key] = self.rendered(
                self.messages[:count], add_generation_prompt=add_generation_prompt
            )
        return self._texts[key]


def _whole_characters(text: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("holds half a character, in a call or a tool perhaps") from error
    return text


def common_prefix_length(first: str, second: str) -> int:
    """Length of the longest common prefix, by bisection: comparing slices runs at memory speed."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

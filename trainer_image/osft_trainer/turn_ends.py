"""What ends a turn: a stop token that the model's folder names, or what the template writes next.

Lives here: finding out by trial which control token a chat template writes behind an answer, behind
a call, and before the turn that follows. Called by `masking`, `turn_layout` and `self_sampling`.
Must never: take a control token for an end that stands inside a turn (behind thoughts, or behind
each of several calls), or know any model family by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from osft_trainer.chat_template import ASKED, ChatTemplate, Message

_ANSWER = "probe_answer"
_QUESTION = "probe_question"
_ANSWERED: Message = {"role": "assistant", "content": _ANSWER}
_CALL_NAME = "probe_name"


def _calling(count: int) -> Message:
    function = {"name": _CALL_NAME, "arguments": {"probe_key": "probe_value"}}
    calls = [
        {"type": "function", "id": f"probe000{number}", "function": function}
        for number in range(count)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


_RESULT: Message = {
    "role": "tool",
    "name": _CALL_NAME,
    "tool_call_id": "probe0000",
    "content": "probe_result",
}


class MissingTurnEnd(ValueError):
    """Nothing that ends an assistant's turn can be trained; it is the template, not the row."""


@dataclass(frozen=True)
class Stop:
    """Where a turn ends that is being written: at a control token or, where none comes, a text."""

    token: str = ""
    text: str = ""
    space: str = ""
    """What the template writes between the turn's own text and either."""

    def cut(self, written: str) -> str:
        """The turn's own text, of what was written as far as the token."""
        before, stopped, _ = (
            written.partition(self.text) if self.text else (written, self.token, "")
        )
        return before.removesuffix(self.space) if stopped else before


class TurnEnds:
    """The ends of the turns that one tokenizer's chat template writes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        """`stop_token_ids`: those that the model's folder names, beside the tokenizer's own."""
        added = tokenizer.added_tokens_decoder
        special = {t.content for t in added.values() if t.special} | set(
            tokenizer.all_special_tokens
        )
        self._special = tuple(special)
        self._control = tuple(special | {t.content for t in added.values()})
        named = {added[number].content for number in stop_token_ids if number in added}
        self.stops = frozenset(named | ({tokenizer.eos_token} if tokenizer.eos_token else set()))
        """Tokens at which a server stops."""
        self._closer = self._closer_of_texts(template.conversation)
        answered = template.tried([ASKED, _ANSWERED])
        called = template.tried([ASKED, _calling(1)])
        self.of_answers = self._behind(answered, _ANSWER)
        """The control token behind an answer; empty: none."""
        self.of_calls = self._behind(called, _CALL_NAME)
        """The same behind a turn with calls, unless each call has it."""
        twice = template.tried([ASKED, _calling(2)])
        if self.of_calls and twice.count(self.of_calls) > called.count(self.of_calls):
            self.of_calls = ""
        self.after_answer = self._next(answered, _ANSWER, template.tried([ASKED, _ANSWERED, ASKED]))
        """What the template writes next where the user goes on, as far as its first control token,
        white space before it included; empty: it begins with none."""
        self.after_call = self._next(
            called, _CALL_NAME, template.tried([ASKED, _calling(1), _RESULT])
        )
        """The same where a call's result follows."""
        self._template = template

    def last(self, text: str, start: int) -> int:
        """Character behind the end of a turn that starts at `start` and is the text's last.

        White space behind it is not the turn's. Where the template closes the text (not the turn)
        with one more control token, what ends the turn is the one before.
        """
        end = len(text.rstrip())
        if self._closer and text.endswith(self._closer, 0, end):
            inner = len(text[: end - len(self._closer)].rstrip())
            if inner > start and text[:inner].endswith(self._special):
                return inner
        return end

    def finished(self, text: str, start: int, *, calls: bool) -> tuple[str, int, str]:
        """An assistant's turn up to its end: the text, the end's character, the token; "": none.

        The text is the same, or goes on as far as the next turn's first token, where that is what
        stops the model. A stop token that the folder names goes before what the template alone
        says.
        """
        end = self.last(text, start)
        token = self._at_end(text[start:end])
        follows = self.after_call if calls else self.after_answer
        going_on = (text[:end] + follows, end + len(follows), follows.strip())
        if token in self.stops:
            return text, end, token
        if follows.strip() in self.stops:
            return going_on
        if token and token in (self.of_answers, self.of_calls if calls else ""):
            return text, end, token
        return going_on if follows else (text, end, "")

    def of_question(self) -> Stop:
        """Where a user's turn ends and the assistant begins."""
        asked = self._template.adapted([{"role": "user", "content": _QUESTION}])
        return self._stop(self._template.prompted(asked).partition(_QUESTION)[2])

    def of_answer(self) -> Stop:
        """Where an assistant's turn ends and the user goes on."""
        going_on = [ASKED, _ANSWERED, {"role": "user", "content": _QUESTION}]
        # Behind an answer that is not the last, some templates write another token.
        answered = going_on[:2] if self.of_answers else going_on
        text = self._template.tried(answered).partition(_ANSWER)[2]
        return self._stop(text.partition(_QUESTION)[0])

    def _stop(self, behind: str) -> Stop:
        """From what the template writes behind a turn's words: its first token, or line."""
        rest = behind.lstrip()
        space = behind[: len(behind) - len(rest)]
        token = longest_prefix(rest, self._control)
        # A model may leave out blanks; line ends tell a header from words of the turn.
        lines = space.lstrip(" ")
        text = "" if token or not rest else lines + rest.partition("\n")[0].rstrip()
        return Stop(token, text, space.removesuffix(lines) if text else space)

    def _behind(self, text: str, words: str) -> str:
        """The control token at the end of a turn, behind these words; empty: none."""
        at = text.rfind(words)
        return self._at_end(text[at + len(words) : self.last(text, at)]) if at >= 0 else ""

    def _next(self, text: str, words: str, longer: str) -> str:
        """White space and control token with which `longer` goes on behind the turn of `text`."""
        end = self.last(text, text.rfind(words))
        if not text or not longer.startswith(text[:end]):
            return ""
        rest = longer[end:]
        token = longest_prefix(rest.lstrip(), self._control)
        return rest[: len(rest) - len(rest.lstrip())] + token if token else ""

    def _at_end(self, text: str) -> str:
        return max((t for t in self._control if t and text.endswith(t)), default="", key=len)

    def _closer_of_texts(self, conversation: str) -> str:
        """The control token at the end of every text that ends no turn within; often none."""
        text = conversation.rstrip()
        last = max((t for t in self._special if text.endswith(t)), default="", key=len)
        is_only_one = text.count(last, text.find("probe")) == 1 if last else False
        return last if is_only_one else ""


def longest_prefix(text: str, tokens: Iterable[str]) -> str:
    """The longest of these tokens that the text starts with; empty: none."""
    return max((t for t in tokens if t and text.startswith(t)), default="", key=len)

"""The text of one turn as a server would see it: the prompt, then what the model has to write.

Lives here: where a turn starts in the text that the chat template writes, and the text of turns
that it writes otherwise than a server would have them: what it moves or drops of the prompt once an
answer follows, and thoughts that it cuts off an answer. Called by `masking`. Must never: know any
model family by name, or lose a word without a refusal.

Let P be the rendered conversation before the turn with the generation prompt, which is what the
model is given, and F the rendered conversation up to and with the turn. Where P begins F, the text
is F. Where they differ behind the conversation so far (the generation prompt opens a thought that
this turn does not have), the text is F, too, from where they differ. Where they differ before, F
does not show what the model is given: then the text is P and, of F, the turn alone. And where F
lacks thoughts of the turn, the text is P and the turn as the model would write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from osft_trainer.chat_template import ChatTemplate, Dialogue, common_prefix_length
from osft_trainer.conversations import THOUGHTS
from osft_trainer.turn_ends import TurnEnds
from osft_trainer.written import OTHER, Lost, Written

_LONGEST_HEADER = 256
"""Characters between the end of a prompt and a turn's first word, at most."""
_OPENED = re.compile(r"<(\w+)>\s*\Z")
"""A tag that the prompt opens for the model."""


@dataclass(frozen=True)
class Turn:
    """A conversation up to one turn."""

    text: str
    start: int
    """Character where the turn begins."""
    prompt_is_served: bool = True
    """Whether a server gives the model what is before it."""


class TurnLayout:
    """Lays out the turns of one tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        ends: TurnEnds,
        written: Written,
    ) -> None:
        """All of the same tokenizer."""
        self._tokenizer = tokenizer
        self._template = template
        self._ends = ends
        self._written = written

    def any_turn(self, dialogue: Dialogue, index: int) -> Turn:
        """Any turn, which begins with its own words.

        Raises:
            ValueError: the chat template refuses it, or leaves words of it out.
        """
        text = dialogue.upto(index + 1)
        turn = Turn(text, self._own_words_start(dialogue, index, text))
        if lost := self._lost(dialogue, index, turn):
            raise ValueError(_refusal(dialogue, index, lost))
        return turn

    def answer(self, dialogue: Dialogue, index: int) -> Turn:
        """An assistant's turn, which begins with what the model has to write.

        Raises:
            ValueError: the chat template refuses it, or leaves words of it out that cannot be
                laid out as the model would write them.
        """
        text = dialogue.upto(index + 1)
        try:
            prompt = dialogue.prompt(index)
        except ValueError:
            if index:
                raise
            # Many templates cannot render an empty conversation, so there is no P to compare.
            return self.any_turn(dialogue, index)
        turn = self._behind_prompt(dialogue, index, text, prompt)
        lost = self._lost(dialogue, index, turn)
        if not lost:
            return turn
        restored = self._with_thoughts(dialogue, index, turn, prompt, lost)
        if restored is None:
            raise ValueError(_refusal(dialogue, index, lost))
        return restored

    def _lost(self, dialogue: Dialogue, index: int, turn: Turn) -> Lost:
        end = self._ends.last(turn.text, turn.start)
        return self._written.lost_of_turn(dialogue, index, turn.text[turn.start : end])

    def _behind_prompt(self, dialogue: Dialogue, index: int, text: str, prompt: str) -> Turn:
        if text.startswith(prompt):
            return Turn(text, len(prompt))
        common = common_prefix_length(prompt, text)
        history = dialogue.upto(index)
        if prompt.startswith(history) and common >= len(history):
            return Turn(text, self._back_to_token_start(prompt, common), prompt_is_served=False)
        # A system prompt that moves to the last user turn, say, or thoughts before a call that go
        # when the answer comes.
        own = self._own_words_start(dialogue, index, text)
        floor = self._other_turns_end(dialogue, index, text)
        return Turn(prompt + text[_header_start(prompt, text, own, floor) :], len(prompt))

    def _with_thoughts(
        self, dialogue: Dialogue, index: int, turn: Turn, prompt: str, lost: Lost
    ) -> Turn | None:
        """The prompt and the turn as the model would write it; None: how, nobody can tell."""
        message = dialogue.messages[index]
        if lost.thoughts:
            opened = _OPENED.search(prompt)
            if lost.content or opened is None or f"</{opened[1]}>" not in self._template.source:
                return None
            thoughts = next(message[key] for key in THOUGHTS if key in message).strip("\n")
            rest = turn.text[turn.start :].lstrip("\n")
            return Turn(f"{prompt}{thoughts}\n</{opened[1]}>\n\n{rest}", len(prompt))
        content = self._template.content(message)
        end = self._ends.last(turn.text, turn.start)
        written = turn.text[turn.start : end]
        behind = self._behind_words(dialogue, index)
        kept = written.removesuffix(behind.rstrip()).strip()
        if "tool_calls" in message or not content.rstrip().endswith(kept):
            return None
        return Turn(prompt + _behind_opened(prompt, content).rstrip() + behind, len(prompt))

    def _behind_words(self, dialogue: Dialogue, index: int) -> str:
        """What the template writes behind an answer's words."""
        other = dialogue.with_other_words(index)
        words = self._template.content(self._template.with_other_words(dialogue.messages[index]))
        return other[other.rfind(words) + len(words) :]

    def _other_turns_end(self, dialogue: Dialogue, index: int, text: str) -> int:
        """Behind what turns before `index` put into its text: where other words there end."""
        changed = [
            self._template.with_content(each, OTHER) if self._template.content(each) else each
            for each in dialogue.messages[:index]
        ]
        try:
            other = dialogue.rendered([*changed, dialogue.messages[index]])
        except ValueError:
            return 0  # the template reads them; what is searched is short all the same
        return len(text) - common_prefix_length(text[::-1], other[::-1])

    def _own_words_start(self, dialogue: Dialogue, index: int, text: str) -> int:
        """Where the turn's words start: where `text` changes when other words are put in."""
        return common_prefix_length(text, dialogue.with_other_words(index))

    def _back_to_token_start(self, prompt: str, position: int) -> int:
        """Move `position` out of the token it cuts: `<think>` must not hide `<table>`'s `<t`."""
        encoded = self._tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for begin, end in encoded["offset_mapping"]:
            if begin < position < end:
                return int(begin)
        return position


def _header_start(prompt: str, text: str, own: int, floor: int) -> int:
    """Where in `text` the turn starts whose words start at `own`: where it last ends as the prompt.

    What the template writes in between (a channel's name, say) is the model's to write. Not before
    `floor`, where other turns' words are.
    """
    best, longest = own, 0
    for place in range(own, max(floor, own - _LONGEST_HEADER) - 1, -1):
        length = _common_suffix_length(prompt, text[:place])
        if length > longest:
            best, longest = place, length
    return best


def _common_suffix_length(first: str, second: str) -> int:
    most = min(len(first), len(second), _LONGEST_HEADER)
    return next((n for n in range(most) if first[-1 - n] != second[-1 - n]), most)


def _behind_opened(prompt: str, content: str) -> str:
    """The content without the tag that the prompt has opened, and without white space it has."""
    opened = _OPENED.search(prompt)
    if opened is None or not content.lstrip().startswith(f"<{opened[1]}>"):
        return content
    space = prompt[opened.end(1) + 1 :]
    return content.lstrip()[len(opened[1]) + 2 :].removeprefix(space)


def _refusal(dialogue: Dialogue, index: int, lost: Lost) -> str:
    message = dialogue.messages[index]
    name = f"message {index + 1} ({message['role']}): the chat template"
    if lost.thoughts:
        key = next(key for key in THOUGHTS if key in message)
        return (
            f"{name} does not write its thoughts ({key}), so they would not be learned: leave them "
            "out, put them into the content as the model shall write them, or use a template that "
            "writes them"
        )
    if "tool_calls" in message:
        return (
            f"{name} leaves its content out beside its calls: leave the content out, or the calls"
        )
    return f"{name} leaves words of its content out, so they would not be learned: take them out"

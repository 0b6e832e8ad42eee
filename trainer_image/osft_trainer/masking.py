"""Which tokens of a conversation carry loss: the assistant's words and the end of its turn.

Lives here: finding the assistant's character ranges in the text that the chat template writes, and
turning them into token masks. Called by `samples` once per data set; the training loop never comes
here. Must never: tokenise a piece of a conversation on its own (tokens would differ from the ones
seen at inference), or know any model family by name.

The rule. For assistant turn i let P be the rendered conversation before it with the generation
prompt (what the model is given at inference) and F the rendered conversation up to and with it. The
turn's sample has the text F, and loss from the end of the longest common prefix of P and F to the
turn's end token. A sample whose text, as far as it carries loss, is how the next one's begins is
made one with it: most templates give one sample a conversation, and those that write a turn
differently once the conversation goes on (thoughts are removed, another end token) give several.
Where other turns are trained, too (`unmask`), it is from their first word to the end of the turn:
what stands before it is the template's, not theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from osft_trainer.chat_template import (
    ChatTemplate,
    Message,
    Messages,
    Tools,
    common_prefix_length,
)
from osft_trainer.conversations import INSTRUCTING_ROLES


@dataclass(frozen=True)
class MaskedText:
    """A rendered conversation; `spans` are the [start, end) characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    has_turn_end: bool

    def continued_by(self, later: Self) -> Self | None:
        """Both as one, if `later` begins with this text as far as it carries loss; else None."""
        end = self.spans[-1][1] if self.spans else 0
        if not later.text.startswith(self.text[:end]):
            return None
        return type(self)(
            later.text, self.spans + later.spans, self.has_turn_end and later.has_turn_end
        )


@dataclass(frozen=True)
class MaskedTokens:
    """One sample: token ids and a mask of the same length, true where the token is a target.

    Ends with the last target, because what follows it changes no loss; so both arrays are empty
    when nothing is to be learned. The first token is never a target: nothing precedes it.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    lengths: tuple[int, ...] = ()
    """Of the pieces that do not see one another; none: it is one piece."""

    @classmethod
    def empty(cls) -> Self:
        """A sample from which nothing is to be learned."""
        return cls(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))

    @classmethod
    def trimmed(cls, input_ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]) -> Self:
        """Take the first token off the mask and cut behind the last target."""
        mask[:1] = False
        targets = np.flatnonzero(mask)
        length = int(targets[-1]) + 1 if len(targets) else 0
        return cls(input_ids[:length], mask[:length])


class ChatMasker:
    """Renders conversations with one tokenizer's chat template and marks the turns to train.

    Raises:
        ValueError: the tokenizer has no chat template, reports no character offsets, or its
            template writes no message text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the tokenizer once, so that no conversation has to."""
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} is a slow one and reports no character "
                "offsets, which the loss mask needs: save it with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special_ids = np.array(
            sorted({i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids)),
            dtype=np.int64,
        )
        special = {t.content for t in added.values() if t.special}
        self._special_texts = tuple(special | set(tokenizer.all_special_tokens))
        self._end_texts = tuple({t.content for t in added.values()} | set(self._special_texts))
        self._text_closer = self._closer_of_texts()

    @property
    def writes_thoughts(self) -> bool:
        """Whether the template has a place for the assistant's thoughts."""
        return self._template.thoughts is not None

    @property
    def writes_tools(self) -> bool:
        """Whether the template tells the model of its tools."""
        return self._template.writes_tools

    def texts(
        self, messages: Messages, tools: Tools = None, *, unmask: bool = False
    ) -> list[MaskedText]:
        """Render one conversation into one or more texts with their loss ranges.

        Args:
            messages: the turns.
            tools: what the assistant may call.
            unmask: loss on every turn but the system's: from its words to the end of the turn.

        Raises:
            ValueError: the chat template refuses the conversation; with the template's words.
        """
        messages = self._template.adapted(messages)
        samples: list[MaskedText] = []
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "assistant" or (unmask and role not in INSTRUCTING_ROLES):
                turn = self._turn(messages, index, tools)
                if samples and (longer := samples[-1].continued_by(turn)) is not None:
                    samples[-1] = longer
                else:
                    samples.append(turn)
        return samples or [MaskedText(self._template.render(messages, tools), (), True)]

    def _turn(self, messages: Messages, index: int, tools: Tools) -> MaskedText:
        """The conversation up to turn `index`, with loss on that turn only."""
        text = self._template.render(messages[: index + 1], tools)
        assistant = messages[index]["role"] == "assistant"
        find = self._turn_start if assistant else self._own_words_start
        start = find(messages, index, tools, text)
        end = self._turn_end(text, start)
        _check_calls(messages[index], index, text[start:end])
        ended = not assistant or text[:end].endswith(self._end_texts)
        return MaskedText(text, ((start, end),) if end > start else (), ended)

    def tokenize(self, texts: Sequence[MaskedText]) -> list[MaskedTokens]:
        """Tokenise whole texts, each once, and carry the character ranges over to the tokens."""
        if not texts:
            return []
        encoded = self._tokenizer(
            [text.text for text in texts],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            self._mask(np.array(ids, dtype=np.int32), offsets, text.spans)
            for ids, offsets, text in zip(
                encoded["input_ids"], encoded["offset_mapping"], texts, strict=True
            )
        ]

    def _mask(
        self,
        input_ids: npt.NDArray[np.int32],
        offsets: Sequence[tuple[int, int]],
        spans: Sequence[tuple[int, int]],
    ) -> MaskedTokens:
        """Mark the tokens that share a character with a span, then cut behind the last one."""
        begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        is_special = np.isin(input_ids, self._special_ids)
        mask = np.zeros(len(input_ids), dtype=np.bool_)
        for first, last in spans:
            # A token without width (a word-start marker) counts where it stands. A token that
            # holds the prompt's last and the answer's first characters is the answer's, except
            # a control token that swallows the white space behind it.
            overlaps = (end > first) | ((begin == end) & (begin >= first))
            mask |= (begin < last) & overlaps & ~(is_special & (begin < first))
        return MaskedTokens.trimmed(input_ids, mask)

    def _turn_start(
        self,
        messages: Messages,
        index: int,
        tools: Tools,
        text: str,
    ) -> int:
        """Character of `text` (= F) where turn `index` starts."""
        try:
            prompt = self._template.render(messages[:index], tools, add_generation_prompt=True)
        except ValueError:
            if index:
                raise
            # Many templates cannot render an empty conversation, so there is no P to compare.
            return self._own_words_start(messages, index, tools, text)
        if text.startswith(prompt):
            return len(prompt)
        common = common_prefix_length(prompt, text)
        history = self._template.render(messages[:index], tools)
        if not prompt.startswith(history) or common < len(history):
            # The two differ before the turn has begun: a system prompt that moves to the last user
            # turn, say, or thoughts before a call that go when the answer comes.
            own = self._own_words_start(messages, index, tools, text)
            return self._behind_prompt(text, own)
        return self._back_to_token_start(prompt, common)

    def _behind_prompt(self, text: str, own: int) -> int:
        """Where a turn starts whose words start at `own`: behind the nearest generation prompt.

        What the template writes in between (a channel's name, say) is the model's to write.
        """
        generation = self._template.generation_prompt
        at = text.rfind(generation, 0, own) if generation else -1
        return own if at < 0 else at + len(generation)

    def _back_to_token_start(self, prompt: str, position: int) -> int:
        """Move `position` out of the token it cuts: `<think>` must not hide `<table>`'s `<t`."""
        encoded = self._tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for begin, end in encoded["offset_mapping"]:
            if begin < position < end:
                return int(begin)
        return position

    def _own_words_start(
        self,
        messages: Messages,
        index: int,
        tools: Tools,
        text: str,
    ) -> int:
        """Where the turn's words start: where `text` changes when other words are put in."""
        changed = [*messages[:index], self._template.with_other_words(messages[index])]
        return common_prefix_length(text, self._template.render(changed, tools))

    def _turn_end(self, text: str, start: int) -> int:
        """Character behind the turn's end token; white space behind it is not trained.

        Where the template closes the text (not the turn) with one more control token, what ends
        the turn is the one before.
        """
        end = len(text.rstrip())
        if self._text_closer and text.endswith(self._text_closer, 0, end):
            inner = len(text[: end - len(self._text_closer)].rstrip())
            if inner > start and text[:inner].endswith(self._special_texts):
                return inner
        return end

    def _closer_of_texts(self) -> str:
        """The control token at the end of every text that ends no turn within; often none."""
        text = self._template.conversation.rstrip()
        last = max((t for t in self._special_texts if text.endswith(t)), default="", key=len)
        is_only_one = text.count(last, text.find("probe")) == 1 if last else False
        return last if is_only_one else ""


def _check_calls(message: Message, index: int, turn: str) -> None:
    """See that the template has written the calls: a turn without them would teach silence."""
    for call in message.get("tool_calls", ()):
        name = call.get("function", call)["name"]
        if name not in turn:
            raise ValueError(
                f"message {index + 1} calls {name!r}, which the chat template does not write: "
                "use a template with tool calls, and one call a turn if it knows no more"
            )

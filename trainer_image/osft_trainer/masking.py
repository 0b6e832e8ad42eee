"""Which tokens of a conversation carry loss: the assistant's words and the end of its turn.

Lives here: putting the turns of a conversation together into samples with the character ranges
that carry loss, and turning these into token masks. Called by `samples` once per data set; the
training loop never comes here. Must never: tokenise a piece of a conversation on its own (tokens
would differ from the ones seen at inference), or know any model family by name.

The rule. An assistant's turn has the text that `turn_layout` gives it, and loss from its start to
the token that ends it (`turn_ends`). A sample whose text, as far as it carries loss, is how the
next one's begins is made one with it: most templates give one sample a conversation, and those that
write a turn differently once the conversation goes on (thoughts are removed, another end token)
give several. Where other turns are trained, too (`unmask`), it is from their first word to the end
of the turn: what stands before it is the template's, not theirs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from osft_trainer.chat_template import ChatTemplate, Dialogue, Messages, Tools
from osft_trainer.conversations import INSTRUCTING_ROLES
from osft_trainer.turn_ends import MissingTurnEnd, TurnEnds
from osft_trainer.turn_layout import TurnLayout
from osft_trainer.written import Written

OnMissingEos = Literal["error", "append", "ignore"]


@dataclass(frozen=True)
class MaskedText:
    """A rendered conversation; `spans` are the [start, end) characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    has_turn_end: bool
    prompt_is_served: bool = True
    """Whether what is before each span is what a server gives the model."""
    stops: frozenset[str] = frozenset()
    """The tokens that end the assistant's turns."""

    def continued_by(self, later: Self) -> Self | None:
        """Both as one, if `later` begins with this text as far as it carries loss; else None."""
        end = self.spans[-1][1] if self.spans else 0
        if not later.text.startswith(self.text[:end]):
            return None
        return type(self)(
            later.text,
            self.spans + later.spans,
            self.has_turn_end and later.has_turn_end,
            self.prompt_is_served and later.prompt_is_served,
            self.stops | later.stops,
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

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Collection[int] = (),
        on_missing_eos: OnMissingEos = "error",
    ) -> None:
        """Check the tokenizer once, so that no conversation has to.

        Args:
            tokenizer: the base model's.
            stop_token_ids: what its folder says that a server stops at.
            on_missing_eos: what to do where nothing that ends an assistant's turn can be trained.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} is a slow one and reports no character "
                "offsets, which the loss mask needs: save it with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.ends = TurnEnds(tokenizer, self.template, stop_token_ids)
        self._written = Written()
        self._layout = TurnLayout(tokenizer, self.template, self.ends, self._written)
        self._on_missing_eos = on_missing_eos
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special_ids = np.array(
            sorted(special | set(tokenizer.all_special_ids)), dtype=np.int64
        )

    def texts(
        self,
        messages: Messages,
        tools: Tools = None,
        *,
        unmask: bool = False,
        without_loss: Collection[int] = (),
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[MaskedText]:
        """Render one conversation into one or more texts with their loss ranges.

        Args:
            messages: the turns.
            tools: what the assistant may call.
            unmask: loss on every turn but the system's: from its words to the end of the turn.
            without_loss: positions of turns that carry none all the same.
            template_arguments: the conversation's own, for the chat template.

        Raises:
            ValueError: the chat template refuses the conversation, with the template's words; or
                leaves words of it out.
            MissingTurnEnd: nothing that ends an assistant's turn can be trained.
        """
        return self.texts_of(
            Dialogue(self.template, messages, tools, template_arguments), unmask, without_loss
        )

    def texts_of(
        self, dialogue: Dialogue, unmask: bool = False, without_loss: Collection[int] = ()
    ) -> list[MaskedText]:
        """As `texts`."""
        samples: list[MaskedText] = []
        last: list[tuple[int, int]] = []
        for index, message in enumerate(dialogue.messages):
            role = message["role"]
            learned = role == "assistant" or (unmask and role not in INSTRUCTING_ROLES)
            if not learned or index in without_loss:
                continue
            turn, start = self._turn(dialogue, index)
            if samples and (longer := samples[-1].continued_by(turn)) is not None:
                samples[-1], last[-1] = longer, (index, start)
            else:
                samples.append(turn)
                last.append((index, start))
        for (index, start), sample in zip(last, samples, strict=True):
            self._written.check_before(dialogue, index, sample.text[:start])
        return samples or [MaskedText(dialogue.upto(len(dialogue.messages)), (), True)]

    def unused_keys(self, dialogue: Dialogue) -> Iterator[tuple[str, str]]:
        """Role and name of each key of a message that the template does not read, each once."""
        return self._written.unused_keys(dialogue)

    def _turn(self, dialogue: Dialogue, index: int) -> tuple[MaskedText, int]:
        """The conversation up to turn `index`, with loss on that turn only, and where it starts."""
        message = dialogue.messages[index]
        if message["role"] != "assistant":
            turn = self._layout.any_turn(dialogue, index)
            text, end, token = turn.text, self.ends.last(turn.text, turn.start), ""
        else:
            turn = self._layout.answer(dialogue, index)
            calls = "tool_calls" in message
            text, end, token = self.ends.finished(turn.text, turn.start, calls=calls)
            if not token and self._on_missing_eos == "append":
                text = text[:end] + self._eos()
                end, token = len(text), self._eos()
            if not token and self._on_missing_eos == "error":
                raise MissingTurnEnd(_no_end(calls))
        spans = ((turn.start, end),) if end > turn.start else ()
        ended = bool(token) or message["role"] != "assistant"
        stops = frozenset({token} - {""})
        return MaskedText(text, spans, ended, turn.prompt_is_served, stops), turn.start

    def _eos(self) -> str:
        if not self._tokenizer.eos_token:
            raise MissingTurnEnd(
                "on_missing_eos append: the tokenizer has no eos_token: set one in its "
                "tokenizer_config.json"
            )
        return str(self._tokenizer.eos_token)

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


def _no_end(calls: bool) -> str:
    turn = "turn with calls" if calls else "turn"
    return (
        f"model_path: the chat template ends an assistant's {turn} with no token that stops the "
        "model, so it would not learn where to stop: mend the template, name the token that it "
        "writes in eos_token_id of generation_config.json, or set on_missing_eos to append (the "
        "tokenizer's eos_token ends each turn) or ignore"
    )

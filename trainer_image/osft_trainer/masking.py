"""Which tokens of a conversation carry loss: the assistant's words and the end of its turn.

Lives here: rendering a conversation with the tokenizer's own chat template, finding the
assistant's character ranges in the text, and turning them into token masks.
Called by `data.prepare` once per data set; the training loop never comes here.
Must never: add text the template did not write, tokenise a piece of a conversation on its own
(tokens would differ from the ones seen at inference), or know any model family by name.

The rule. For assistant turn i let P be the rendered conversation before it with the generation
prompt (what the model is given at inference) and F the rendered conversation up to and with it.
P a prefix of F, and F a prefix of the whole rendered text, for every turn: one sample, loss from
the end of P to the turn's end token. Otherwise the template writes a turn differently once the
conversation goes on (thoughts are removed, another end token), and every assistant turn becomes a
sample of its own, with the text F.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]


@dataclass(frozen=True)
class MaskedText:
    """A rendered conversation; `spans` are the [start, end) characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    has_turn_end: bool


@dataclass(frozen=True)
class MaskedTokens:
    """One sample: token ids and a mask of the same length, true where the token is a target.

    Ends with the last target, because what follows it changes no loss; so both arrays are empty
    when nothing is to be learned. The first token is never a target: nothing precedes it.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]


class ChatMasker:
    """Renders conversations with one tokenizer's chat template and marks the assistant's turns.

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
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: use an instruct model, or put a "
                "chat_template.jinja beside its tokenizer.json"
            )
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special_ids = np.array(
            sorted({i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids)),
            dtype=np.int64,
        )
        special = {t.content for t in added.values() if t.special}
        self._special_texts = tuple(special | set(tokenizer.all_special_tokens))
        self._end_texts = tuple({t.content for t in added.values()} | set(self._special_texts))
        self._content_as_parts = self._needs_parts()

    def texts(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[MaskedText]:
        """Render one conversation into one or more texts with their loss ranges.

        Raises:
            ValueError: the chat template refuses the conversation; with the template's words.
        """
        full = self._render(messages, tools)
        turns: list[MaskedText] = []
        one_text = True
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_last = index == len(messages) - 1
            text = full if is_last else self._render(messages[: index + 1], tools)
            start, is_prefix = self._turn_start(messages, index, tools, text)
            end = self._turn_end(text, start)
            ended = text[:end].endswith(self._end_texts)
            turns.append(MaskedText(text, ((start, end),) if end > start else (), ended))
            one_text = one_text and is_prefix and full.startswith(text)
        if not one_text:
            return turns
        spans = tuple(span for turn in turns for span in turn.spans)
        return [MaskedText(full, spans, all(turn.has_turn_end for turn in turns))]

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
        if not len(input_ids):
            return MaskedTokens(input_ids, np.zeros(0, dtype=np.bool_))
        begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        is_special = np.isin(input_ids, self._special_ids)
        mask = np.zeros(len(input_ids), dtype=np.bool_)
        for first, last in spans:
            # A token without width (a word-start marker) counts where it stands. A token that
            # holds the prompt's last and the answer's first characters is the answer's, except
            # a control token that swallows the white space behind it.
            overlaps = (end > first) | ((begin == end) & (begin >= first))
            mask |= (begin < last) & overlaps & ~(is_special & (begin < first))
        mask[0] = False
        targets = np.flatnonzero(mask)
        length = int(targets[-1]) + 1 if len(targets) else 0
        return MaskedTokens(input_ids[:length], mask[:length])

    def _turn_start(
        self,
        messages: Sequence[Message],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
    ) -> tuple[int, bool]:
        """Character of `text` (= F) where turn `index` starts, and whether P is a prefix of it."""
        try:
            prompt = self._render(messages[:index], tools, add_generation_prompt=True)
        except ValueError:
            if index:
                raise
            # Many templates cannot render an empty conversation, so there is no P to compare.
            return self._own_words_start(messages, index, tools, text), True
        if text.startswith(prompt):
            return len(prompt), True
        common = common_prefix_length(prompt, text)
        history = self._render(messages[:index], tools)
        if not prompt.startswith(history) or common < len(history):
            # The two differ before the turn has begun (a system prompt that moves to the last
            # user turn, say): only the assistant's own words are known to be its own.
            return self._own_words_start(messages, index, tools, text), False
        return self._back_to_token_start(prompt, common), False

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
        messages: Sequence[Message],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
    ) -> int:
        """Where the turn's content starts: where `text` changes when other words are put in."""
        words = _text_of(messages[index])
        other = "\u241f" if not words.startswith("\u241f") else "\u241e"
        changed = {**messages[index], "content": other}
        return common_prefix_length(text, self._render([*messages[:index], changed], tools))

    def _turn_end(self, text: str, start: int) -> int:
        """Character behind the turn's end token; white space behind it is not trained.

        Some templates close the text (not the turn) with one more control token after white
        space; what ends the turn is the one before.
        """
        end = len(text.rstrip())
        while True:
            closing = [t for t in self._special_texts if text.endswith(t, 0, end)]
            last = max(closing, default="", key=len)
            inner = len(text[: end - len(last)].rstrip())
            separated = last and inner < end - len(last)
            if not separated or inner <= start or not text[:inner].endswith(self._special_texts):
                return end
            end = inner

    def _needs_parts(self) -> bool:
        """Whether the template wants content as a list of parts, as image models' templates do."""
        probe = [{"role": "user", "content": "probe"}]
        refused = False
        for as_parts in (False, True):
            self._content_as_parts = as_parts
            try:
                if "probe" in self._render(probe, None):
                    return as_parts
            except ValueError:  # perhaps it wants more than one message: each will speak for itself
                refused = refused or not as_parts
        if not refused:
            raise ValueError("the tokenizer's chat template leaves the messages' words out: fix it")
        return False

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        if self._content_as_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m.get("content") or ""}]}
                for m in messages
            ]
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        # Templates are programs: a missing key or a wrong type shows up as any of these.
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return str(rendered)


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


def _text_of(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""

"""From rows to samples, in each of the three forms that data may have.

Lives here: `Chat` (messages), `Documents` (plain text in blocks) and `Processed` (token ids and
labels). Called by `data.prepare`. Must never: hold more than a few rows, read files, or lose a row
without a word to `faults`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from osft_trainer.chat_template import Dialogue
from osft_trainer.conversations import ROW_KEYS, as_object, conversation, keys_of, kind_of
from osft_trainer.faults import Faults
from osft_trainer.masking import ChatMasker, MaskedText, MaskedTokens, OnMissingEos
from osft_trainer.prepared import NO_LOSS
from osft_trainer.sources import Row
from osft_trainer.turn_ends import MissingTurnEnd

TEXTS_AT_ONCE = 64
"""Tokenised together: enough for the tokenizer's threads."""
CHARACTERS_AT_ONCE = 1 << 20
"""Bound of the same, for long texts: a token takes some 300 bytes while it is tokenised."""

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Placed:
    """A sample, and where it came from."""

    place: str
    tokens: MaskedTokens


class Form(Protocol):
    """A form of data. Its fields decide what becomes of a row, and nothing else does."""

    def samples(
        self, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, faults: Faults
    ) -> Iterator[Placed]:
        """Yield the samples in order; put rows that cannot be used into `faults`.

        Raises:
            ValueError: `faults` is full, or the tokenizer cannot be used.
        """
        ...


@dataclass(frozen=True)
class Chat:
    """Conversations, rendered by the tokenizer's chat template."""

    unmask: bool = False
    """Loss on every turn but the system's, in all of them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens at which a server stops, as the model's folder names them."""
    on_missing_eos: OnMissingEos = "error"
    """What to do where nothing that ends an assistant's turn can be trained."""

    def samples(
        self, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, faults: Faults
    ) -> Iterator[Placed]:
        """See `Form`."""
        masker = ChatMasker(tokenizer, self.stop_token_ids, self.on_missing_eos)
        texts = self._texts(rows, masker, faults)
        unknown = _UnknownTokens(tokenizer)
        for group in _groups(texts, lambda placed: len(placed[1].text)):
            tokens = masker.tokenize([text for _, text in group])
            for (place, _), each in zip(group, tokens, strict=True):
                unknown.check(place, each.input_ids)
                yield Placed(place, each)

    def _texts(
        self, rows: Iterable[Row], masker: ChatMasker, faults: Faults
    ) -> Iterator[tuple[str, MaskedText]]:
        """Every text with the place it came from; refusals of the template are faults."""
        notes = _Notes(masker)
        for row in rows:
            try:
                found = conversation(row.value)
                dialogue = Dialogue(
                    masker.template, found.messages, found.tools, found.template_arguments
                )
                unmask = self.unmask or found.unmask
                texts = masker.texts_of(dialogue, unmask, found.without_loss)
            except MissingTurnEnd as error:
                # Of the template, so each such row has it: one error, whatever becomes of bad rows.
                raise ValueError(f"{error} (seen in {row.place})") from error
            except ValueError as error:
                faults.bad(row.place, str(error))
                continue
            notes.take(row.value, dialogue, texts)
            for text in texts:
                yield row.place, text


class _Notes:
    """What nothing uses, or the template does not write: a warning each, once."""

    def __init__(self, masker: ChatMasker) -> None:
        self._masker = masker
        self._given: set[str] = set()

    def take(self, row: dict[str, Any], dialogue: Dialogue, texts: list[MaskedText]) -> None:
        """Look at one row."""
        template = self._masker.template
        for key in row.keys() - ROW_KEYS:
            self._warn(f"nothing uses {key!r} of a row")
        for key in dialogue.arguments:
            if not template.names(key):
                self._warn(f"the chat template does not use {key!r} of chat_template_kwargs")
        for role, key in self._masker.unused_keys(dialogue):
            self._warn(f"the chat template does not use {key!r} of a message of the role {role}")
        if dialogue.tools and not template.writes_tools:
            self._warn("the chat template does not write the tools: the model is not told of them")
        if not all(text.has_turn_end for text in texts):
            self._warn(
                "the chat template writes no token at the end of an assistant turn: the model "
                "will not learn from this data where to stop"
            )
        if not all(text.prompt_is_served for text in texts):
            self._warn(
                "a server begins an assistant's turn with "
                f"{template.generation_prompt!r}, and the chat template writes some of these turns "
                "otherwise: they are learned from where the two differ, behind a prompt that no "
                "server gives. Add thoughts (reasoning_content) or leave them out, or switch them "
                "by chat_template_kwargs, as the template names it"
            )
        for stop in frozenset[str]().union(*(text.stops for text in texts)):
            if stop not in self._masker.ends.stops:
                self._warn(
                    f"the chat template ends an assistant's turn with {stop!r}, at which a server "
                    "does not stop: name it in eos_token_id of generation_config.json"
                )

    def _warn(self, line: str) -> None:
        if line not in self._given:
            self._given.add(line)
            logger.warning("%s", line)


class _UnknownTokens:
    """A warning, once, where the tokenizer has no token for a piece of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        unknown = tokenizer.unk_token_id
        # Some tokenizers name a token here that ends their texts, and know every text.
        others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self._id = None if unknown in others else unknown
        self._token = tokenizer.unk_token

    def check(self, place: str, ids: Ids) -> None:
        """Look for it in one sample."""
        if self._id is not None and (ids == self._id).any():
            self._id = None
            logger.warning(
                "%s: the tokenizer has no token for some of the text, and writes %r in its place: "
                "such text is not learned; further samples are not named",
                place,
                self._token,
            )


@dataclass(frozen=True)
class Documents:
    """Plain text: an end-of-text token behind each document, all cut into blocks.

    A block is a sample. The documents in it do not see one another, and the first token of each
    piece is not predicted; the last block is as long as what is left.
    """

    block_size: int
    column: str | None = None
    """Where a row keeps its text; None: in `document`, else in `text`."""

    def samples(
        self, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, faults: Faults
    ) -> Iterator[Placed]:
        """See `Form`."""
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "is_pretraining needs a token between documents, and the tokenizer has no "
                "eos_token: set one in its tokenizer_config.json"
            )
        block = _Block(self.block_size)
        unknown = _UnknownTokens(tokenizer)
        place = ""
        for group in _groups(self._texts(rows, faults), lambda placed: len(placed[1])):
            encoded = tokenizer(
                [text for _, text in group],
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for (place, text), ids in zip(group, encoded["input_ids"], strict=True):
                if not text.strip():
                    yield Placed(place, MaskedTokens.empty())
                    continue
                if not ids or ids[-1] != tokenizer.eos_token_id:
                    ids.append(tokenizer.eos_token_id)
                document = np.array(ids, dtype=np.int32)
                unknown.check(place, document)
                for tokens in block.fill(document):
                    yield Placed(place, tokens)
        if block.pieces:
            yield Placed(place, block.take())

    def _texts(self, rows: Iterable[Row], faults: Faults) -> Iterator[tuple[str, str]]:
        for row in rows:
            try:
                yield row.place, self._text(row.value)
            except ValueError as error:
                faults.bad(row.place, str(error))

    def _text(self, value: Any) -> str:
        row = as_object(value, "a document")
        names = [self.column] if self.column is not None else ["document", "text"]
        name = next((name for name in names if name in row), None)
        if name is None:
            raise ValueError(
                f"has no {' and no '.join(map(repr, names))}{keys_of(row)}: "
                "set document_column_name"
            )
        text = row[name]
        if not isinstance(text, str):
            raise ValueError(f"{name!r} must be a string, is {kind_of(text)}")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{name!r} holds half a character") from error
        return text


class _Block:
    """A block that is being filled."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._room = size
        self.pieces: list[Ids] = []

    def fill(self, document: Ids) -> Iterator[MaskedTokens]:
        """Lay a document in, and yield each block that becomes full."""
        while len(document):
            piece, document = document[: self._room], document[self._room :]
            self.pieces.append(piece)
            self._room -= len(piece)
            if not self._room:
                yield self.take()

    def take(self) -> MaskedTokens:
        """The block as it is; the next one is empty."""
        ids = np.concatenate(self.pieces)
        lengths = tuple(len(piece) for piece in self.pieces)
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[np.cumsum((0, *lengths[:-1]))] = False
        self.pieces, self._room = [], self._size
        return MaskedTokens(ids, mask, lengths)


@dataclass(frozen=True)
class Processed:
    """Token ids with labels: -100, or the id at its own place. They are not shifted."""

    def samples(
        self, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, faults: Faults
    ) -> Iterator[Placed]:
        """See `Form`."""
        vocabulary = 1 + max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
        for row in rows:
            try:
                yield Placed(row.place, _processed(row.value, vocabulary))
            except ValueError as error:
                faults.bad(row.place, str(error))


def _processed(value: Any, vocabulary: int) -> MaskedTokens:
    row = as_object(value, "'input_ids' and 'labels'")
    ids, labels = _numbers(row, "input_ids"), _numbers(row, "labels")
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} input_ids but {len(labels)} labels: give one for each")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(wrong):
        raise ValueError(
            f"input_ids[{wrong[0]}] is {ids[wrong[0]]}: the tokenizer has the ids 0 to "
            f"{vocabulary - 1}"
        )
    wrong = np.flatnonzero((labels != NO_LOSS) & (labels != ids))
    if len(wrong):
        first = wrong[0]
        raise ValueError(
            f"labels[{first}] is {labels[first]}: must be {NO_LOSS} or input_ids[{first}], which "
            f"is {ids[first]} (labels are not shifted)"
        )
    return MaskedTokens.trimmed(ids.astype(np.int32), labels != NO_LOSS)


def _numbers(row: dict[str, Any], name: str) -> npt.NDArray[np.int64]:
    if name not in row:
        raise ValueError(f"has no {name!r}{keys_of(row)}")
    values = row[name]
    if not isinstance(values, list):
        raise ValueError(f"{name!r} must be a list of token ids, is {kind_of(values)}")
    if not values:
        raise ValueError(f"{name!r} is empty")
    if set(map(type, values)) != {int}:
        raise ValueError(f"{name!r} must hold whole numbers and nothing else")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"{name!r} holds a number that is no token's: {error}") from error


def _groups(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of a few items, shorter where they are large."""
    group: list[Item] = []
    held = 0
    for item in items:
        group.append(item)
        held += size(item)
        if len(group) >= TEXTS_AT_ONCE or held >= CHARACTERS_AT_ONCE:
            yield group
            group, held = [], 0
    if group:
        yield group

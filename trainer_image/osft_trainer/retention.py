"""The text of what shall be kept: where it comes from, and which of it serves for what.

Lives here: preparing the user's retention text, sampling one from the model where none is given,
and its three disjoint parts. Called by `assembly` and `export_checkpoint` before the model is
converted, by `train`, and by `planning`. Must never: let two parts share a sample, or let a label
of `checked` or `judged` be learned.

The parts: `read`, that the used directions are read off and that is learned again where
`replay_ratio` asks for it; `checked`, that their energy in the free
directions is measured on; `judged`, that the loss before and after is measured on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft_trainer.activations import Row, on_device
from osft_trainer.agreement import from_first_rank
from osft_trainer.config import TrainingParameters
from osft_trainer.data import chat_of, form_of, open_prepared, prepare
from osft_trainer.durable import write_file
from osft_trainer.model import load_tokenizer
from osft_trainer.model_digest import tokenizer_digest
from osft_trainer.model_limits import check_fits, check_own_text
from osft_trainer.order import epoch_order
from osft_trainer.packing import collate
from osft_trainer.parallel import World
from osft_trainer.prepared import PreparedPart
from osft_trainer.replay import Replay
from osft_trainer.report import RunFolder
from osft_trainer.self_sampling import sample_conversations, sample_documents

logger = logging.getLogger(__name__)

LEAST_SAMPLES = 10
"""Fewer do not fill three parts."""
_HELD_OUT = 10
"""One sample in so many is checked, one is judged; the others are read."""
ROW_TOKENS = 2048
"""Most tokens of one forward pass while reading, where a rank may hold so many."""


@dataclass(frozen=True)
class RetentionText:
    """Prepared retention text in its parts; the same on every rank."""

    read: PreparedPart
    checked: PreparedPart
    judged: PreparedPart
    digest: str
    """Of the prepared text and of how much of it is read."""
    sampled: bool
    """Whether the model wrote it itself."""
    row_tokens: int = ROW_TOKENS
    """Tokens of one forward pass while it is read."""


def prepare_retention(
    training: TrainingParameters,
    folder: RunFolder,
    world: World,
    hf: PreTrainedModel | None,
    base_digest: str,
) -> RetentionText | None:
    """Prepare the text that `retention_data_path` names, or that the model writes. Collective.

    None if there is no such path and the result does not depend on a text.

    Args:
        training: the run's parameters.
        folder: its cache takes the prepared text.
        world: this process's place.
        hf: the loaded model, before it is converted; asked only where no path is given. None: what
            it wrote must lie in the cache.
        base_digest: digest of its content; another model's text is not taken for its own.

    Raises:
        ValueError: on every rank, if the text cannot be used.
    """
    sampled = training.retention_data_path is None
    if sampled and not training.text_decides:
        return None

    def on_first_rank() -> str:
        tokenizer = load_tokenizer(training.model_path, training.trust_remote_code)
        try:
            path = training.retention_data_path
            prepared = prepare(
                path or _sampled(training, folder, world, hf, tokenizer, base_digest),
                tokenizer,
                max_seq_len=training.max_seq_len,
                on_overlong="truncate",
                cache_root=folder.cache,
                # What the model writes by itself need not go through its own chat template.
                on_bad_sample=training.on_bad_sample if path else "skip",
                form=form_of(training) if path or training.is_pretraining else chat_of(training),
            )
        except ValueError as error:
            told = str(error).removeprefix("retention_data_path: ")
            about = "retention_" if told.startswith("data_path") else "retention_data_path: "
            raise ValueError(about + told) from error
        return str(prepared.folder)

    prepared = open_prepared(from_first_rank(world, on_first_rank))
    if hf is not None:
        check_fits(hf, prepared, "retention_data_path")
    if len(prepared) < LEAST_SAMPLES:
        what = "the model's own text" if sampled else training.retention_data_path
        raise ValueError(
            f"retention_data_path: {what} holds {len(prepared)} samples, "
            f"at least {LEAST_SAMPLES} are needed: some are read, others measure what is kept"
        )
    found = parts(prepared.whole(), training.retention_tokens, prepared.digest, sampled)
    return replace(found, row_tokens=min(ROW_TOKENS, training.max_tokens_per_gpu))


def parts(whole: PreparedPart, tokens: int, digest: str, sampled: bool) -> RetentionText:
    """Deal the samples out in a fixed shuffled order; `read` takes so many tokens, at least one."""
    order = epoch_order(len(whole), seed=0, epoch=0)
    place = np.arange(len(order)) % _HELD_OUT
    small = max(1, tokens // _HELD_OUT)
    return RetentionText(
        read=whole.part(_first(order[place > 1], whole.lengths, tokens)),
        checked=whole.part(_first(order[place == 0], whole.lengths, small)),
        judged=whole.part(_first(order[place == 1], whole.lengths, small)),
        digest=hashlib.sha256(f"{digest} {tokens}".encode()).hexdigest()[:32],
        sampled=sampled,
    )


def replay_of(training: TrainingParameters, text: RetentionText | None) -> Replay | None:
    """What is learned again; None where nothing is."""
    if not training.replay_ratio:
        return None
    assert text is not None, "a replay has a text"
    return Replay(text.read, training.replay_ratio, training.seed)


def rows(part: PreparedPart, row_tokens: int = ROW_TOKENS) -> Iterator[Row]:
    """The samples packed into rows of at most so many tokens, in their order.

    A sample that has more is a row of its own.
    """
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    tokens = 0
    for index in range(len(part)):
        length = int(part.lengths[index])
        if held and tokens + length > row_tokens:
            yield _row(held)
            held, tokens = [], 0
        held += part.pieces(index)
        tokens += length
    if held:
        yield _row(held)


def _row(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> Row:
    packed = collate(pieces)
    return packed.input_ids, packed.position_ids


def _first(
    indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], tokens: int
) -> npt.NDArray[np.int64]:
    """The first of these samples that have so many tokens together, at least one sample."""
    before = np.cumsum(lengths[indices]) - lengths[indices]
    return indices[before < tokens]


def _sampled(
    training: TrainingParameters,
    folder: RunFolder,
    world: World,
    hf: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    base_digest: str,
) -> Path:
    """The file of what the model writes by itself; written once a run folder."""
    tokens, length, seed = training.retention_tokens, training.max_seq_len, training.seed
    drawn = [base_digest, seed, tokens, length]
    column = training.document_column_name or "text"
    if training.is_pretraining:
        drawn.append(column)
    path = _sampled_file(folder, [*drawn, tokenizer_digest(Path(training.model_path))])
    if path.is_file():
        return path
    earlier = _sampled_file(folder, drawn)
    # Versions before left the tokenizer out; a run that goes on has the tokenizer of its start.
    if earlier.is_file() and folder.complete_checkpoints():
        return earlier
    if hf is None:
        raise ValueError(f"what the model wrote for the run is gone: {path} is needed")
    logger.info("no retention_data_path: the model writes %d tokens", tokens)
    check_own_text(hf, length)
    with on_device(hf, world):
        if training.is_pretraining:
            samples = sample_documents(
                hf, tokenizer, column=column, tokens=tokens, max_seq_len=length, seed=seed
            )
        else:
            samples = sample_conversations(
                hf, tokenizer, tokens=tokens, max_seq_len=length, seed=seed
            )
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_file(path, "".join(lines))
    return path


def _sampled_file(folder: RunFolder, drawn: list[Any]) -> Path:
    key = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]
    return folder.cache / "retention" / f"sampled-{key}.jsonl"


__all__ = ["LEAST_SAMPLES", "RetentionText", "parts", "prepare_retention", "replay_of", "rows"]

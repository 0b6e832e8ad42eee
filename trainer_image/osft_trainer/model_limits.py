"""Which token ids and positions a model can be given, beside those that the data hold.

Called by `assembly`, `planning` and `retention` when both are there, on every rank, and by
`spectrum`; the model may be on meta. Must never: read the data's arrays, which may be larger than
memory. An id or a position beyond the model's tables is an IndexError on CPU and an assertion of
the device on CUDA: neither tells what to change, and both look as if trying again could help.
"""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from osft_trainer.prepared import PreparedData

_ROWS_IN_FRONT = 2
"""Most rows of a table of positions that stand for none (OPT and BioGPT)."""

logger = logging.getLogger(__name__)


def check_fits(hf: PreTrainedModel, data: PreparedData, name: str) -> None:
    """Refuse data with ids or positions that the model has not; `name` is their parameter.

    Raises:
        ValueError: names the parameter, what is beyond, and what to do.
    """
    check_ids(hf, data.largest_id, name)
    positions = table_of_positions(hf)
    if positions is not None and data.longest > positions:
        raise ValueError(
            f"max_seq_len: a sample of {name} has {data.longest} tokens, and the model at "
            f"model_path has a table of {positions} positions: set max_seq_len (of documents "
            f"block_size) to at most {positions}, and on_overlong to drop or truncate"
        )


def check_ids(hf: PreTrainedModel, largest: int, name: str) -> None:
    """Refuse data whose largest token id the model has not; `name` is their parameter.

    Raises:
        ValueError: names the parameter, the id, and what to do.
    """
    rows = hf.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"{name}: the token id {largest} is in the data, and the embedding of the model at "
            f"model_path has rows for the ids 0 to {rows - 1} only: give the tokenizer that "
            "belongs to the model, or resize the model's embeddings to it "
            "(resize_token_embeddings) and save both"
        )


def check_own_text(hf: PreTrainedModel, max_seq_len: int) -> None:
    """Refuse to let the model write texts of more tokens than it has positions for.

    Raises:
        ValueError: says what to set.
    """
    positions = table_of_positions(hf)
    if positions is not None and positions < max_seq_len:
        raise ValueError(
            f"retention_data_path: max_seq_len {max_seq_len} is more than the {positions} "
            "positions that the model has a table of, and without this path it writes texts of "
            f"that length itself: set max_seq_len to at most {positions}, or give a file with "
            "text of the old skills"
        )


def warn_beyond(hf: PreTrainedModel, longest: int) -> None:
    """Say so when a sample of so many tokens is longer than the model was made for, yet runs."""
    made_for = _max_positions(hf)
    if made_for is not None and longest > made_for and table_of_positions(hf) is None:
        logger.warning(
            "the longest sample has %d tokens, more than the model was made for "
            "(max_position_embeddings %d in its config.json): it may learn badly behind that",
            longest,
            made_for,
        )


def table_of_positions(hf: PreTrainedModel) -> int | None:
    """How many positions the model has rows for; None where it computes them as they come."""
    count = _max_positions(hf)
    if count is None:
        return None
    words = hf.get_input_embeddings()
    learned = (
        module.num_embeddings
        for module in hf.modules()
        if isinstance(module, nn.Embedding) and module is not words
    )
    fixed = (  # of GPT-J and CodeGen
        len(buffer)
        for name, buffer in hf.named_buffers()
        if name.rpartition(".")[2] == "embed_positions"
    )
    found = any(0 <= rows - count <= _ROWS_IN_FRONT for rows in (*learned, *fixed))
    return count if found else None


def _max_positions(hf: PreTrainedModel) -> int | None:
    found: int | None = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    return found

"""How much each decoder block passes on, by which adaptive ranks are dealt out.

Lives here: measuring it on text of the old skills, once for a run: what is in the run's cache is
read, not measured again, since another rounding could move a rank and make the run's states those
of another split. Called by `assembly`. Must never: choose ranks (`targets` does).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from osft_trainer.activations import Row, on_device
from osft_trainer.agreement import from_first_rank
from osft_trainer.durable import write_file
from osft_trainer.forward import evaluating, packed_hidden
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.retention import RetentionText, rows
from osft_trainer.targets import decoder_blocks

FORMAT_VERSION = 1
"""Part of the digest: raise it when the numbers change."""

logger = logging.getLogger(__name__)


def importance_of_run(
    hf: PreTrainedModel, text: RetentionText, folder: RunFolder, base_digest: str, world: World
) -> list[float]:
    """`block_importance` of the text that is read, as this run measured it first. Collective.

    Args:
        hf: the loaded model, before it is converted.
        text: of the old skills.
        folder: its cache keeps the numbers.
        base_digest: digest of the base model's content.
        world: this process's place; the first rank measures.

    Raises:
        ValueError, OSError: on every rank, where the first one met it.
    """
    key = json.dumps([FORMAT_VERSION, base_digest, text.digest])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = folder.cache / "importance" / f"{name}.json"

    def on_first_rank() -> str:
        kept = _kept(path, len(decoder_blocks(hf)[1]))
        if kept is None:
            with on_device(hf, world):
                kept = block_importance(hf, list(rows(text.read, text.row_tokens)))
            write_file(path, json.dumps(kept) + "\n")
        return json.dumps(kept)

    found: list[float] = json.loads(from_first_rank(world, on_first_rank))
    return found


def _kept(path: Path, blocks: int) -> list[float] | None:
    """What the file holds; None when there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    is_list = isinstance(found, list) and len(found) == blocks
    if is_list and all(isinstance(number, float) for number in found):
        return list(found)
    logger.warning("%s is damaged and is made anew", path)
    return None


@torch.no_grad()
def block_importance(hf: PreTrainedModel, rows: Sequence[Row]) -> list[float]:
    """How much each decoder block passes on of what it is given, 1 in the mean.

    The mean over tokens of the cosine between a block's input and output, divided by the mean over
    blocks (Nayak et al., 2025, section 3.3).

    Raises:
        ValueError: if the blocks turn their inputs around so that the mean is not above zero.
    """
    _, blocks = decoder_blocks(hf)
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=hf.device)
    seen = [0] * len(blocks)

    def add(number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            before, after = (x.flatten(0, -2).double() for x in (inputs[0], out))
            sums[number] += torch.cosine_similarity(before, after, dim=-1).sum()
            seen[number] += len(before)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(hf))
        for number, block in enumerate(blocks):
            handle = block.register_forward_hook(add(number))
            stack.callback(handle.remove)
        for input_ids, position_ids in rows:
            packed_hidden(hf, input_ids.to(hf.device), position_ids.to(hf.device))
    means = [total / max(count, 1) for total, count in zip(sums.tolist(), seen, strict=True)]
    mean = sum(means) / len(means)
    if mean <= 0:
        raise ValueError(
            "rank_allocation: adaptive finds no block that passes its input on; use uniform"
        )
    return [one / mean for one in means]

"""What a run would do, on paper: targets, energy, memory, steps, data.

Lives here: finding all of it out; how it is told is in `plan_report`. Called by `inspect`. Prepares
the run's data, as the run itself would (its cache then serves the run). Must never: start a process
group, train, or write anything else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from osft_trainer.assembly import check_data, compute_dtype, plan_of, prepare_data
from osft_trainer.base_layout import check_way_back
from osft_trainer.base_model import local_folder
from osft_trainer.bases import singular_values
from osft_trainer.bins import pack
from osft_trainer.config import TrainingParameters
from osft_trainer.data_files import find_data_files
from osft_trainer.layout import Layout, layout_of
from osft_trainer.memory import converted, empty_model, memory_of
from osft_trainer.model import load_model
from osft_trainer.model_limits import check_own_text
from osft_trainer.order import epoch_order
from osft_trainer.packing import batches_per_epoch
from osft_trainer.parallel import World
from osft_trainer.plan_report import Report
from osft_trainer.prepared import PreparedData
from osft_trainer.report import RunFolder
from osft_trainer.retention import RetentionText, prepare_retention, replay_of
from osft_trainer.schedule import learning_rates, total_steps
from osft_trainer.targets import Plan
from osft_trainer.unused_weights import not_loaded

_PROBED_BATCHES = 20
"""Optimizer steps that are packed to learn how many passes a step has."""


def make_report(
    training: TrainingParameters, *, processes: int, device: str, energy: bool
) -> Report:
    """Everything about the run that can be known before it.

    Args:
        training: the parameters, with paths of this machine.
        processes: of the whole run.
        device: cuda or cpu, where the run will be; nothing is computed there.
        energy: read the weights and compute their singular values; takes about as long as the
            run's own decomposition.

    Raises:
        ValueError: the run would refuse its input, too; or energies are asked for where not the
            strong directions of the matrix are kept.
    """
    if energy and training.split_by == "activations":
        raise ValueError(
            "--energy has no meaning with split_by activations, which keeps directions of the "
            "inputs, not of the matrix: leave it out; the run notes usedShare in plan.json"
        )
    world = World(0, 0, 1, torch.device("cpu"))
    base = local_folder(training.model_path)
    training = training.model_copy(update={"model_path": str(base)})
    dtype = compute_dtype(training.compute_dtype, torch.device(device))
    hf = empty_model(base, dtype, training.trust_remote_code)
    beside = not_loaded(hf, base)
    plan = plan_of(hf, training)
    check_way_back(hf, base, plan.trained)
    folder = RunFolder(Path(training.ckpt_output_dir))
    prepared, held_out = prepare_data(training, folder, world)
    check_data(hf, prepared, held_out, warns=True)
    text = None
    if training.retention_data_path is not None:
        text = prepare_retention(training, folder, world, hf, base_digest="")
    elif training.text_decides:
        check_own_text(hf, training.max_seq_len)
    steps = total_steps(training, prepared)
    learning_rates(training, steps)
    passes = _passes_per_step(prepared, training, processes, text, layout_of(hf.config))
    memory = memory_of(
        converted(hf, plan),
        processes=processes,
        tokens=training.max_tokens_per_gpu,
        activation_checkpointing=training.activation_checkpointing,
        selective=training.selective_activation_checkpointing,
        accumulates=passes > 1,
        pinned=device == "cuda",
    )
    return Report(
        model_path=str(base),
        device=device,
        compute_dtype=str(dtype).removeprefix("torch."),
        processes=processes,
        plan=plan,
        energy_kept=_energy_kept(base, plan, training) if energy else None,
        memory=memory,
        steps=steps,
        steps_per_epoch=batches_per_epoch(len(prepared), training.effective_batch_size),
        passes_per_step=passes,
        counts=prepared.counts,
        files=find_data_files(training.data_path),
        adaptive=training.rank_allocation == "adaptive",
        not_loaded=beside,
    )


def _passes_per_step(
    prepared: PreparedData,
    training: TrainingParameters,
    processes: int,
    text: RetentionText | None,
    layout: Layout,
) -> int:
    order = epoch_order(len(prepared), training.seed, 0)
    size, limit = training.effective_batch_size, training.max_tokens_per_gpu
    starts = range(0, min(len(order), _PROBED_BATCHES * size), size)
    batches = [prepared.lengths[order[start : start + size]] for start in starts]
    again = [
        _replayed_lengths(training, text, start, lengths)
        for start, lengths in zip(starts, batches, strict=True)
    ]
    both = (np.concatenate(pair) for pair in zip(batches, again, strict=True))
    return max(len(pack(lengths, processes, limit, layout)) for lengths in both)


def _replayed_lengths(
    training: TrainingParameters,
    text: RetentionText | None,
    first: int,
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Of what a step learns again; text still to be written is taken to be as long as the data."""
    if text is None:
        return np.resize(lengths, round(training.replay_ratio * len(lengths)))
    replay = replay_of(training, text)
    if replay is None:
        return lengths[:0]
    return replay.part.lengths[replay.between(first, first + len(lengths))]


def _energy_kept(base: Path, plan: Plan, training: TrainingParameters) -> dict[str, float]:
    hf = load_model(base, torch.float32, training.trust_remote_code)
    return {
        target.name: energy_kept(hf.get_parameter(target.parameter), target.free_rank)
        for target in plan.targets
    }


@torch.no_grad()
def energy_kept(weight: torch.Tensor, rank: int) -> float:
    """Share of the squared singular values of [batch x] rows x cols in the kept directions."""
    kept = total = 0.0
    for matrix in weight.detach().reshape(-1, *weight.shape[-2:]):
        squares = singular_values(matrix) ** 2
        total += float(squares.sum())
        kept += float(squares[: len(squares) - rank].sum())
    return kept / total if total else 1.0

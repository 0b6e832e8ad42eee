"""What a run is made of, before its first step: prepared data, the model, the plan on paper.

Called by `train`, by all ranks together; `export_checkpoint` and `planning` call parts of it.
Must never: train, or write anything but the cache and plan.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from osft_trainer import decomposition
from osft_trainer.agreement import from_first_rank
from osft_trainer.attention import use_variable_length
from osft_trainer.base_layout import check_way_back
from osft_trainer.blocks import compile_blocks, enable_activation_checkpointing, keep_free_parts
from osft_trainer.config import TrainingParameters
from osft_trainer.data import form_of, open_prepared, prepare
from osft_trainer.data_files import find_data_files
from osft_trainer.decomposition import Decompositions
from osft_trainer.export import left_out
from osft_trainer.importance import importance_of_run
from osft_trainer.liger import apply_liger
from osft_trainer.masters import fill_masters
from osft_trainer.model import OSFTModel, convert, load_model, load_tokenizer
from osft_trainer.model_limits import check_fits, warn_beyond
from osft_trainer.parallel import World, shard
from osft_trainer.prepared import PreparedData
from osft_trainer.report import RunFolder, write_atomically
from osft_trainer.retention import RetentionText, prepare_retention
from osft_trainer.targets import Plan, plan_targets
from osft_trainer.unused_weights import NotLoaded, log_not_loaded, not_loaded
from osft_trainer.validation import split_off

logger = logging.getLogger(__name__)


def prepare_data(
    training: TrainingParameters, folder: RunFolder, world: World
) -> tuple[PreparedData, PreparedData | None]:
    """Tokenise on the first rank, open on the others: what to train on, and to validate on.

    Raises:
        ValueError: on every rank, when the data or the tokenizer cannot be used.
    """
    prepared = _prepared(training, training.data_path, folder, world)
    if training.validation_split > 0:
        return split_off(prepared, training.validation_split)
    if training.validation_data_path is None:
        return prepared, None
    try:
        return prepared, _prepared(training, training.validation_data_path, folder, world)
    except ValueError as error:
        text = str(error).removeprefix("data_path").removeprefix(":").lstrip()
        raise ValueError(f"validation_data_path: {text}") from error


def _prepared(
    training: TrainingParameters, path: str, folder: RunFolder, world: World
) -> PreparedData:
    def on_first_rank() -> str:
        tokenizer = load_tokenizer(training.model_path, training.trust_remote_code)
        prepared = prepare(
            path,
            tokenizer,
            max_seq_len=training.max_seq_len,
            on_overlong=training.on_overlong,
            cache_root=folder.cache,
            on_bad_sample=training.on_bad_sample,
            form=form_of(training),
        )
        return str(prepared.folder)

    return open_prepared(from_first_rank(world, on_first_rank))


def build_model(
    training: TrainingParameters,
    folder: RunFolder,
    world: World,
    *,
    base_digest: str,
    prepared: PreparedData,
    steps: int | None,
    held_out: PreparedData | None = None,
) -> tuple[OSFTModel, str, RetentionText | None]:
    """Load, plan, decompose, convert, shard; plan.json is written on the way.

    Returns:
        The model on its device, the digest of its decomposition, and the text of what is kept.

    Raises:
        ValueError: the model cannot be trained like this, or nothing of it would be.
    """
    # A bar per rank makes the log of a pod unreadable.
    transformers_logging.disable_progress_bar()
    dtype = compute_dtype(training.compute_dtype, world.device)
    hf = load_model(training.model_path, dtype, training.trust_remote_code)
    check_data(hf, prepared, held_out, warns=world.rank == 0)
    text = prepare_retention(training, folder, world, hf, base_digest)
    importance = None
    if training.rank_allocation == "adaptive":
        assert text is not None, "adaptive ranks have a text"
        importance = importance_of_run(hf, text, folder, base_digest, world)
    plan = plan_of(hf, training, importance)
    if plan.trainable == 0:
        raise ValueError(
            f"unfreeze_rank_ratio {training.unfreeze_rank_ratio} with other_parameters "
            f"{training.other_parameters} leaves nothing to train: raise one of them"
        )
    beside = _check_base(hf, plan, Path(training.model_path), world)
    _write_plan(training, plan, prepared, held_out, steps, folder, world, beside)
    selective = training.selective_activation_checkpointing
    liger_off = apply_liger(hf, training.use_liger, world.device, selective)
    dense_mask = use_variable_length(hf, world.device)
    if world.local_rank == 0:
        # Of each node: what a machine lacks, another may have.
        logger.info("%s", liger_off or "Liger kernels are on")
        logger.info("%s", dense_mask or "packed samples take torch's variable-length attention")
    if training.activation_checkpointing:
        enable_activation_checkpointing(hf, selective)
    bases = decomposition.prepare(
        hf, plan, cache=folder.cache, base_digest=base_digest, world=world, retention=text
    )
    if text is not None:
        _write_retention(text, bases, folder, world)
    model = convert(hf, plan, decompose=bases.decompose, fused_loss=liger_off is None)
    if not training.activation_checkpointing:
        keep_free_parts(model)
    fill_masters(hf, Path(training.model_path), dtype, tell=world.rank == 0)
    if training.torch_compile:
        compile_blocks(hf, world.device)
    shard(model, world)
    return model, bases.digest, text


def _check_base(hf: PreTrainedModel, plan: Plan, base: Path, world: World) -> tuple[NotLoaded, ...]:
    """What of the base is no part of the model; and that the rest can be saved again."""
    beside = not_loaded(hf, base)

    def on_first_rank() -> str:
        check_way_back(hf, base, plan.trained)
        log_not_loaded(beside)
        if other := left_out(base):
            logger.info("not read, and in no model folder of this run: %s", ", ".join(other))
        return ""

    from_first_rank(world, on_first_rank)
    return beside


def check_data(
    hf: PreTrainedModel, prepared: PreparedData, held_out: PreparedData | None, *, warns: bool
) -> None:
    """Refuse data that the model, which may be on meta, has no tokens or positions for.

    Raises:
        ValueError: says what to change.
    """
    check_fits(hf, prepared, "data_path")
    if held_out is not None:
        check_fits(hf, held_out, "validation_data_path")
    if warns:
        warn_beyond(hf, max(data.longest for data in (prepared, held_out) if data is not None))


def plan_of(
    hf: nn.Module, training: TrainingParameters, importance: Sequence[float] | None = None
) -> Plan:
    """The plan that the parameters mean for this model, which may be on meta.

    `importance` of each decoder block goes with rank_allocation adaptive.
    """
    return plan_targets(
        hf,
        training.unfreeze_rank_ratio,
        training.parameterization,
        training.target_patterns,
        training.other_parameters,
        training.split_by,
        importance,
    )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the frozen weights that parameter `compute_dtype` means on this device."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _write_retention(
    text: RetentionText, bases: Decompositions, folder: RunFolder, world: World
) -> None:
    """Add to plan.json, and say, what is known about the text and the room it leaves."""
    shares = {t.name: share for t in bases.plan.targets if (share := bases.used_share(t))}
    read = bases.inputs_read()

    def on_first_rank() -> str:
        document = json.loads(folder.plan.read_text(encoding="utf-8"))
        document["retention"] = {
            "sampledFromModel": text.sampled,
            "tokensRead": int(text.read.lengths.sum()) if read is None else read,
            "tokensJudged": int(text.judged.lengths.sum()),
            "usedShare": shares,
        }
        write_atomically(folder.plan, json.dumps(document, indent=1) + "\n")
        if shares:
            worst = max(shares, key=shares.__getitem__)
            logger.info(
                "of the energy of inputs on retention text that was not read, the free directions "
                "hold %.2g in the mean, %.2g at most (%s)",
                sum(shares.values()) / len(shares),
                shares[worst],
                worst,
            )
        return ""

    from_first_rank(world, on_first_rank)


def _write_plan(
    training: TrainingParameters,
    plan: Plan,
    prepared: PreparedData,
    held_out: PreparedData | None,
    steps: int | None,
    folder: RunFolder,
    world: World,
    beside: tuple[NotLoaded, ...],
) -> None:
    """Put on paper, and in the log, what will be trained on what."""
    counts = prepared.counts
    document = {
        **plan.to_json(),
        "not_loaded": [part.to_json() for part in beside],
        "left_out": left_out(Path(training.model_path)),
        "steps": steps,
        "processes": world.size,
        "data": {"digest": prepared.digest, **asdict(counts)},
    }
    if held_out is not None:
        document["validation"] = {"digest": held_out.digest, **asdict(held_out.counts)}

    def on_first_rank() -> str:
        document["dataFiles"] = find_data_files(training.data_path).to_json()
        logger.info(
            "%d matrices are targets; of %d numbers %d are trained; %d parameters that are no "
            "target stay frozen, %d are trained",
            len(plan.targets),
            plan.total,
            plan.trainable,
            len(plan.uncovered),
            len(plan.trained_others),
        )
        logger.info(
            "%d samples with %d loss tokens; %s optimizer steps; %d processes",
            counts.samples,
            counts.loss_tokens,
            "endless" if steps is None else steps,
            world.size,
        )
        write_atomically(folder.plan, json.dumps(document, indent=1) + "\n")
        return ""

    from_first_rank(world, on_first_rank)

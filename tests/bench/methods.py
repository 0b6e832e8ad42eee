"""One object for each way of training that the benchmark compares.

All of them load the same folder, take the loss from the same code, clip by the same norm and step
the same AdamW; only what is trained, and how the weights are put together, differs. To add one,
give `METHODS` a name and a function that builds it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from osft_trainer.attention import use_variable_length
from osft_trainer.blocks import enable_activation_checkpointing, keep_free_parts
from osft_trainer.decomposition import part_shapes, prepare
from osft_trainer.export import export_hf
from osft_trainer.forward import packed_loss
from osft_trainer.liger import apply_liger
from osft_trainer.model import Decompose, OSFTModel, convert, load_model
from osft_trainer.moments import SharedMoment
from osft_trainer.optimizer import build_optimizer
from osft_trainer.parallel import World, clip_gradients
from osft_trainer.report import RunFolder
from osft_trainer.retention import RetentionText, prepare_retention
from osft_trainer.shards import HostCopy, write_rows
from osft_trainer.subspace import Split
from osft_trainer.targets import Plan, Target, plan_targets
from tiny_models import SAME_INPUT

LORA_RANK = 32
TEXT_CONVERSATIONS = 400
"""Some 12,000 tokens: more than the widest input of the CPU's models."""


@dataclass(frozen=True)
class Setting:
    """What is equal for all methods."""

    base: Path
    """Folder of the base model."""
    work: Path
    """For caches and what is saved."""
    world: World
    dtype: torch.dtype
    """Of the frozen weights and the arithmetic."""
    ratio: float
    activation_checkpointing: bool
    liger: bool
    selective: bool = False
    """Whether recomputed blocks keep the results of matrix products; Liger rotates nothing then."""
    random_bases: bool = False
    """Whether nothing is split: a step takes as long with any bases."""


@dataclass
class Method:
    """A model that trains."""

    setting: Setting
    loss: Callable[[Tensor, Tensor], Tensor]
    """Sum of token losses of input_ids and position_ids, both [1, T]; labels are the ids."""
    trainables: Mapping[str, nn.Parameter]
    module: nn.Module
    export: Callable[[Path], object]
    """Write a dense Hugging Face folder; the model may be unusable afterwards."""
    before_clip: Callable[[], object] = lambda: None
    after_step: Callable[[int], object] = lambda step: None
    """Is given how many steps were done."""
    shared: Mapping[str, SharedMoment] = field(default_factory=dict)
    """Factors whose second moment is shared, by name."""
    steps: int = 0
    """Optimizer steps that were done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Start-up by part."""

    def __post_init__(self) -> None:
        # The peer's rate. At that of the tiny runs a large model ends in numbers that are none, and
        # products of those take less power, so less time.
        told = tiny.training(Path("m"), Path("d"), Path("o"), learning_rate=1e-5)
        self.optimizer = build_optimizer(self.trainables, told, shared=self.shared)

    def step(self, tokens: Tensor) -> float:
        """One optimizer step on [1, T]; the loss. Waits for the device at its end."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        loss = self.loss(tokens, positions) / tokens.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        self.before_clip()
        clip_gradients(self.trainables.values(), 1.0, self.setting.world)
        self.optimizer.step()
        self.steps += 1
        self.after_step(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def static_bytes(self) -> dict[str, int]:
        """What lies in memory between two steps; after the first step."""
        state = [
            value
            for entry in self.optimizer.state.values()
            for value in entry.values()
            if isinstance(value, Tensor) and value.dim() > 0
        ]
        parts = {
            "parameters": list(self.module.parameters()),
            "buffers": list(self.module.buffers()),
            "optimizer": state,
        }
        return {name: _bytes(tensors) for name, tensors in parts.items()}

    def save(self, folder: Path) -> int:
        """Write the state to resume from; its bytes."""
        folder.mkdir(parents=True)
        write_rows(folder, 0, HostCopy().take(self.trainables, self.optimizer))
        return sum(path.stat().st_size for path in folder.iterdir())


def _bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def timed(seconds: dict[str, float], name: str, world: World) -> Iterator[None]:
    """Note the seconds of the block, the device's work included."""
    began = time.perf_counter()
    yield
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - began


def _load(setting: Setting, seconds: dict[str, float]) -> tuple[PreTrainedModel, bool]:
    """The base model with what all methods share; whether the fused loss is there."""
    with timed(seconds, "load", setting.world):
        hf = load_model(setting.base, setting.dtype)
    off = apply_liger(hf, setting.liger, setting.world.device, setting.selective)
    for reason in (off, use_variable_length(hf, setting.world.device)):
        if reason is not None and setting.world.device.type == "cuda":
            print(reason, file=sys.stderr)  # what is measured is slower than it could be
    if setting.activation_checkpointing:
        enable_activation_checkpointing(hf, setting.selective)
    return hf, off is None


def ours(setting: Setting, parameterization: str, split_by: str = "weights") -> Method:
    """Our trainer; `dense` is plain fine-tuning of everything."""
    seconds: dict[str, float] = {}
    hf, fused = _load(setting, seconds)
    plain = parameterization == "dense"
    others = "all" if plain else "frozen"
    plan = plan_targets(hf, setting.ratio, parameterization, None, others, split_by)
    decompose = _random(setting, plan) if setting.random_bases else None
    if decompose is None:
        decompose = _decomposed(setting, hf, plan, seconds)
    with timed(seconds, "convert", setting.world):
        model = convert(hf, plan, decompose=decompose, fused_loss=fused)
        model.to(setting.world.device)
    if not setting.activation_checkpointing:
        keep_free_parts(model)
    return _of_ours(setting, model, seconds)


def _decomposed(
    setting: Setting, hf: PreTrainedModel, plan: Plan, seconds: dict[str, float]
) -> Decompose:
    """The bases as a run has them, computed and then read."""
    text = _text(setting, hf) if plan.split_by == "activations" else None
    for part in ("decompose", "decompose from cache"):
        with timed(seconds, part, setting.world):
            cache = setting.work / "cache"
            bases = prepare(
                hf, plan, cache=cache, base_digest="bench", world=setting.world, retention=text
            )
            for target in plan.targets:
                split = bases.decompose(target, hf.get_parameter(target.parameter).detach())
                # a file that is only mapped is not read
                [part.clone() for part in split.to_tensors().values()]
    return bases.decompose


def _random(setting: Setting, plan: Plan) -> Decompose:
    """Directions of length 1, nearly orthogonal; shared as those of a run are."""
    shared: dict[tuple[str, str], Split] = {}

    def decompose(target: Target, weight: Tensor) -> Split:
        parent, _, leaf = target.module.rpartition(".")
        key = (parent, SAME_INPUT.get(leaf, leaf))
        if plan.split_by == "activations" and key in shared:
            return shared[key]
        parts: dict[str, Tensor] = {}
        for name, shape in part_shapes(target, plan).items():
            length = max(shape) ** 0.5 if len(shape) > 1 else 1.0
            parts[name] = torch.randn(shape, device=setting.world.device) / length
        if plan.split_by == "activations":
            parts = {n: nn.Parameter(p, requires_grad=False) for n, p in parts.items()}
            return shared.setdefault(key, Split.from_tensors(parts))
        return Split.from_tensors(parts)

    return decompose


def _text(setting: Setting, hf: PreTrainedModel) -> RetentionText | None:
    """What stands for the text of old skills; its content does not matter for speed."""
    setting.work.mkdir(parents=True, exist_ok=True)
    data = tiny.data_file(setting.work / "old.jsonl", conversations=TEXT_CONVERSATIONS)
    told = tiny.training(
        setting.base,
        data,
        setting.work,
        retention_data_path=str(data),
        split_by="activations",
    )
    return prepare_retention(told, RunFolder(setting.work), setting.world, hf, "bench")


def _of_ours(setting: Setting, model: OSFTModel, seconds: dict[str, float]) -> Method:
    return Method(
        setting,
        lambda ids, positions: model(input_ids=ids, position_ids=positions, labels=ids),
        model.trainables(),
        model,
        lambda folder: export_hf(model, setting.base, folder, setting.world, digest="bench"),
        model.project_gradients,
        model.finish_step,
        model.shared_moments(),
        seconds=seconds,
    )


def peft(setting: Setting, kind: str) -> Method:
    """PEFT's OSF at the same share of free directions, or LoRA, on the same matrices."""
    from peft import LoraConfig, OSFConfig, get_peft_model

    seconds: dict[str, float] = {}
    hf, fused = _load(setting, seconds)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if kind == "osf":
        config = OSFConfig(effective_rank=1 - setting.ratio, target_modules=names)
    else:
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names)
    hf.to(setting.world.device)
    with timed(seconds, "decompose", setting.world), _spared(setting.random_bases):
        tuned = get_peft_model(hf, config)
    if setting.random_bases:
        del seconds["decompose"]
    trainables = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    for parameter in trainables.values():
        parameter.data = parameter.data.float()
    return Method(
        setting,
        lambda ids, positions: packed_loss(hf, ids, positions, ids, fused),
        trainables,
        tuned,
        lambda folder: tuned.merge_and_unload().save_pretrained(folder),
        seconds=seconds,
    )


@contextmanager
def _spared(spares: bool) -> Iterator[None]:
    """Inside, random vectors stand for singular ones, if so."""
    real = torch.linalg.svd

    def drawn(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = matrix.shape
        short = min(rows, cols)
        left, right = matrix.new_empty(rows, short), matrix.new_empty(short, cols)
        return left.normal_() / rows**0.5, matrix.new_ones(short), right.normal_() / cols**0.5

    try:
        torch.linalg.svd = drawn if spares else real
        yield
    finally:
        torch.linalg.svd = real


def mini_trainer(setting: Setting) -> Method:
    """mini_trainer's own OSFT, with the attention of its TESTING=true path."""
    from bench import mini_trainer_peer

    return mini_trainer_peer.build(setting)


METHODS: dict[str, Callable[[Setting], Method]] = {
    "plain fine-tuning": lambda setting: ours(setting, "dense"),
    "OSFT exact": lambda setting: ours(setting, "exact"),
    "OSFT core": lambda setting: ours(setting, "core"),
    "OSFT factored": lambda setting: ours(setting, "factored"),
    "OSFT activations": lambda setting: ours(setting, "exact", "activations"),
    "PEFT OSF": lambda setting: peft(setting, "osf"),
    f"LoRA r={LORA_RANK}": lambda setting: peft(setting, "lora"),
    "mini_trainer OSFT": mini_trainer,
}
PLAIN = "plain fine-tuning"
"""What the others are compared with."""
CUDA_ONLY = ("mini_trainer OSFT",)

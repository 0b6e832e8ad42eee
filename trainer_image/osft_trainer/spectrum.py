"""How much of a model lies in the directions that a ratio would free.

Lives here: the singular-value energy of each target, the loss on given data with the free parts of
all targets zeroed, and the ratio that follows. Called by `inspect` (`osft spectrum`). Must never:
change the model's files, or recommend a ratio from energies alone: a direction of little energy may
carry much of what a model can do, and no spectrum shows it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from osft_trainer.base_model import local_folder, stop_token_ids
from osft_trainer.data import prepare
from osft_trainer.forward import loss_tokens, packed_loss
from osft_trainer.model import load_model, load_tokenizer
from osft_trainer.model_limits import check_fits, check_ids, table_of_positions
from osft_trainer.packing import MicroBatch, collate
from osft_trainer.plan_report import pattern_of
from osft_trainer.samples import Chat
from osft_trainer.subspace import free_rank
from osft_trainer.targets import Plan, Target, plan_targets

BLOCK_TOKENS = 512
"""Length of the pieces that plain text is cut into."""
LONGEST_SAMPLE = 2048
"""Where samples of chat data are cut."""


@dataclass(frozen=True)
class Spectrum:
    """What was found; lists go with `ratios`."""

    model_path: str
    ratios: list[float]
    free_energy: dict[str, list[float]]
    """By target: share of the squared singular values in the free part."""
    loss: float | None
    """Mean loss a token of the model as it is, in nats; None without data."""
    zeroed_loss: list[float] | None
    """The same with the free parts of all targets zeroed."""
    tokens: int
    """Tokens that the losses are means over."""
    tolerance: float

    @property
    def recommended(self) -> float | None:
        """The largest ratio tried, up to which zeroing costs at most the tolerance; else None."""
        if self.loss is None or self.zeroed_loss is None:
            return None
        best = None
        for ratio, loss in zip(self.ratios, self.zeroed_loss, strict=True):
            if not loss - self.loss <= self.tolerance:
                break
            best = ratio
        return best

    def advice(self) -> str:
        """The recommendation and its rule, in words."""
        if self.loss is None:
            return (
                "no ratio is recommended without --data: energies do not tell what the free part "
                "is used for"
            )
        rule = (
            f"the largest ratio tried up to which zeroing the free parts of all matrices raises "
            f"the loss by at most {self.tolerance:g} nats a token"
        )
        if self.recommended is None:
            return (
                f"no ratio tried is safe by the rule ({rule}): even {self.ratios[0]:g} costs more; "
                "try smaller ones (--ratios)"
            )
        return f"recommended unfreezeRankRatio: {self.recommended:g} ({rule})"

    def to_json(self) -> str:
        """One JSON object."""
        found = {**asdict(self), "recommended": self.recommended, "advice": self.advice()}
        if self.zeroed_loss is not None:
            # Zeroing may ruin a model altogether; JSON has no word for NaN or infinity.
            found["zeroed_loss"] = [x if math.isfinite(x) else None for x in self.zeroed_loss]
        if self.loss is not None and not math.isfinite(self.loss):
            found["loss"] = None
        return json.dumps(found, indent=1, allow_nan=False)

    def to_text(self) -> str:
        """Tables for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.model_path}: share of energy in the free part, by ratio"
        head = "".join(f"{ratio:>9g}" for ratio in self.ratios)
        yield f"{'':<52}{head}"
        for name, shares in self.by_kind().items():
            yield f"{name:<52}" + "".join(f"{share:>9.2%}" for share in shares)
        if self.loss is not None and self.zeroed_loss is not None:
            yield ""
            yield f"loss a token, of {self.tokens} tokens: {self.loss:.4f} as it is"
            yield f"{'with the free parts zeroed':<52}" + "".join(
                f"{loss:>9.3f}" for loss in self.zeroed_loss
            )
            yield f"{'more by':<52}" + "".join(
                f"{loss - self.loss:>9.3f}" for loss in self.zeroed_loss
            )
        yield ""
        yield self.advice()

    def by_kind(self) -> dict[str, list[float]]:
        """Mean free energy of the targets that differ only in their layer."""
        groups: dict[str, list[list[float]]] = {}
        for name, shares in self.free_energy.items():
            groups.setdefault(pattern_of(name), []).append(shares)
        return {
            name: [sum(column) / len(column) for column in zip(*rows, strict=True)]
            for name, rows in groups.items()
        }


def measure(
    model_path: str,
    data: Path | None,
    ratios: Sequence[float],
    *,
    tolerance: float,
    max_tokens: int,
    target_patterns: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Spectrum:
    """Decompose every target once; with data, measure the loss at every ratio.

    Args:
        model_path: folder or hub name.
        data: chat data (JSONL, or a folder of such) or plain text (.txt); None: energies only.
        ratios: to try, each between 0 and 1.
        tolerance: most that zeroing may cost, in nats a token.
        max_tokens: of the data that are used, from its beginning.
        target_patterns: as in a run.
        trust_remote_code: as in a run.

    Raises:
        ValueError: model, data or ratios cannot be used.
    """
    tried = sorted(set(ratios))
    base = local_folder(model_path)
    hf = load_model(base, torch.float32, trust_remote_code).eval()
    plan = plan_targets(hf, tried[-1], "core", target_patterns)
    batches = [] if data is None else _batches(hf, base, data, max_tokens, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="osft-spectrum-") as folder:
        energy = {
            target.name: _decompose(hf, target, tried, Path(folder) / f"{number}.safetensors")
            for number, target in enumerate(plan.targets)
        }
        loss, zeroed = None, None
        if batches:
            loss, zeroed = _mean_loss(hf, batches), []
            for ratio in tried:
                _zero(hf, plan, ratio, Path(folder))
                zeroed.append(_mean_loss(hf, batches))
    tokens = sum(loss_tokens(b.labels, b.position_ids) for b in batches)
    return Spectrum(str(base), tried, energy, loss, zeroed, tokens, tolerance)


@torch.no_grad()
def _decompose(
    hf: PreTrainedModel, target: Target, ratios: Sequence[float], path: Path
) -> list[float]:
    """Free energies of one target; its weakest directions go to a file, memory holds one target."""
    rows, cols = target.shape[-2:]
    weakest: list[Tensor] = []
    free = torch.zeros(len(ratios), dtype=torch.float64)
    total = 0.0
    for matrix in hf.get_parameter(target.parameter).reshape(-1, rows, cols).double():
        short = matrix if rows <= cols else matrix.mT
        values, vectors = torch.linalg.eigh(short @ short.mT)
        values = values.clamp_min(0)
        total += float(values.sum())
        free += torch.stack([values[: free_rank(rows, cols, ratio)].sum() for ratio in ratios])
        weakest.append(vectors[:, : target.free_rank].float())
    save_file({"weakest": torch.stack(weakest).contiguous()}, path)
    return [float(share) for share in free / (total or 1.0)]


@torch.no_grad()
def _zero(hf: PreTrainedModel, plan: Plan, ratio: float, folder: Path) -> None:
    """Take the free parts out of all targets, in place. Ratios come in rising order."""
    for number, target in enumerate(plan.targets):
        rows, cols = target.shape[-2:]
        rank = free_rank(rows, cols, ratio)
        weakest = load_file(folder / f"{number}.safetensors")["weakest"][..., :rank]
        parameter = hf.get_parameter(target.parameter)
        matrices = parameter.data.reshape(-1, rows, cols)
        if rows <= cols:
            matrices -= weakest @ (weakest.mT @ matrices)
        else:
            matrices -= (matrices @ weakest) @ weakest.mT
        parameter.data.copy_(matrices.reshape(parameter.shape))


@torch.no_grad()
def _mean_loss(hf: PreTrainedModel, batches: Sequence[MicroBatch]) -> float:
    total = sum(
        float(packed_loss(hf, batch.input_ids, batch.position_ids, batch.labels))
        for batch in batches
    )
    return total / sum(loss_tokens(batch.labels, batch.position_ids) for batch in batches)


def _batches(
    hf: PreTrainedModel, base: Path, data: Path, max_tokens: int, trust_remote_code: bool
) -> list[MicroBatch]:
    """The beginning of the data, one sample a batch."""
    tokenizer = load_tokenizer(base, trust_remote_code)
    if data.suffix == ".txt":
        text = data.read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:max_tokens])
        length = min(BLOCK_TOKENS, table_of_positions(hf) or BLOCK_TOKENS)
        samples = [(part, part) for part in torch.split(ids, length) if len(part) > 1]
        if not samples:
            raise ValueError(f"--data: {data} holds no text")
        check_ids(hf, int(ids.max()), "--data")
        return [collate([sample]) for sample in samples]
    with tempfile.TemporaryDirectory(prefix="osft-spectrum-") as cache:
        prepared = prepare(
            data,
            tokenizer,
            max_seq_len=min(LONGEST_SAMPLE, table_of_positions(hf) or LONGEST_SAMPLE),
            on_overlong="truncate",
            cache_root=cache,
            # Nothing is learned here, so no end can be missed.
            form=Chat(stop_token_ids=stop_token_ids(base), on_missing_eos="ignore"),
        )
        check_fits(hf, prepared, "--data")
        used = int((prepared.lengths.cumsum() <= max_tokens).sum()) or 1
        return [collate([prepared.sample(number)]) for number in range(used)]

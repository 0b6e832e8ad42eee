"""The methods of the retention benchmark: each turns a model into one that trains, and a step.

Used by `retention`. Peers come from their own packages; ours are made of the trainer's parts, with
the text that a method reads handed in as tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from retention_report import LORA_RANKS
from torch import Tensor, nn
from transformers import PreTrainedModel

from osft_trainer.activations import Row, input_groups, least_used, second_moments
from osft_trainer.importance import block_importance
from osft_trainer.model import Decompose, convert
from osft_trainer.moments import SharedMoment
from osft_trainer.subspace import Split
from osft_trainer.targets import Plan, Target, plan_targets

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Trained:
    """A model ready to train."""

    hf: nn.Module
    """Gives logits for input_ids."""
    parameters: list[nn.Parameter]
    shared: Mapping[nn.Parameter, SharedMoment] = field(default_factory=dict)
    """Of which the second moment is shared."""
    before_clipping: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None


def plain(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """Plain fine-tuning: everything is trained."""
    del ratio, text
    return Trained(hf, list(hf.parameters()))


def lora(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """PEFT's LoRA on the matrices that OSFT splits."""
    from peft import LoraConfig, get_peft_model

    del text
    rank = LORA_RANKS[ratio]
    tuned = get_peft_model(hf, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS))
    return Trained(tuned, [p for p in tuned.parameters() if p.requires_grad])


def peft_osf(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """PEFT's OSF; its effective rank is the kept share."""
    from peft import OSFConfig, get_peft_model

    del text
    tuned = get_peft_model(hf, OSFConfig(effective_rank=1 - ratio, target_modules=PROJECTIONS))
    return Trained(tuned, [p for p in tuned.parameters() if p.requires_grad])


def by_weights(parameterization: str) -> Callable[[PreTrainedModel, float, list[Row]], Trained]:
    """Our OSFT, split by the weights."""

    def make(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
        del text
        return _osft(hf, plan_targets(hf, ratio, parameterization), None)

    return make


def gradients_too(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """Our OSFT with AdamW's own step, after which the values are projected as well."""
    return replace(by_weights("exact")(hf, ratio, text), shared={})


def values_only(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """The same with whole gradients: values alone are projected."""
    return replace(gradients_too(hf, ratio, text), before_clipping=lambda: None)


def adaptive(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """Our OSFT, split by the weights, with ranks that follow the importance of the blocks."""
    plan = plan_targets(hf, ratio, "exact", importance=block_importance(hf, text))
    return _osft(hf, plan, None)


def by_activations(hf: PreTrainedModel, ratio: float, text: list[Row]) -> Trained:
    """Our OSFT, split by what the matrices see on a text."""
    plan = plan_targets(hf, ratio, split_by="activations")
    groups = input_groups(hf, plan, text[0])
    moments = second_moments(hf, groups, text)
    bases = {
        target.name: least_used(moment.total, group.rank)
        for group, moment in zip(groups, moments, strict=True)
        for target in group.targets
    }

    def decompose(target: Target, weight: Tensor) -> Split:
        del weight
        return Split(free_cols=bases[target.name])

    return _osft(hf, plan, decompose)


def _osft(hf: PreTrainedModel, plan: Plan, decompose: Decompose | None) -> Trained:
    model = convert(hf, plan, decompose)
    model.finish_step()
    trainables = model.trainables()
    return Trained(
        model.hf,
        list(trainables.values()),
        {trainables[name]: moment for name, moment in model.shared_moments().items()},
        model.project_gradients,
        model.finish_step,
    )


METHODS: dict[str, Callable[[PreTrainedModel, float, list[Row]], Trained]] = {
    "plain fine-tuning": plain,
    "LoRA": lora,
    "PEFT OSF": peft_osf,
    "osft exact": by_weights("exact"),
    "osft exact, values only": values_only,
    "osft exact, gradients too": gradients_too,
    "osft exact, adaptive ranks": adaptive,
    "osft core": by_weights("core"),
    "osft factored": by_weights("factored"),
    "osft activations, retention text": by_activations,
    "osft activations, own text": by_activations,
    "plain fine-tuning, replay": plain,
    "osft activations, replay": by_activations,
}
ELEMENTWISE = ("osft exact, values only", "osft exact, gradients too")
"""Second moments of their own for all numbers."""
USUAL = [name for name in METHODS if name not in ELEMENTWISE]
"""Without what has been compared once, with a result of its own."""
PLAIN = "plain fine-tuning"
OWN_TEXT = "osft activations, own text"
BY_WEIGHTS = "osft exact"
PLAIN_REPLAY = "plain fine-tuning, replay"
REPLAY = "osft activations, replay"
REPLAYED = (PLAIN_REPLAY, REPLAY)
"""They learn old text again in every step."""
READ_OWN_TEXT = (OWN_TEXT, *REPLAYED)
WITHOUT_RATIO = (PLAIN, PLAIN_REPLAY)


def as_rows(tokens: Tensor, at_once: int = 16) -> list[Row]:
    """[samples, T] of one length as packed rows, short ones: attention costs their square."""
    places = torch.arange(tokens.shape[1])
    return [(part.reshape(1, -1), places.repeat(len(part))[None]) for part in tokens.split(at_once)]

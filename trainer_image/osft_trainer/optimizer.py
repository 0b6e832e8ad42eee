"""AdamW over what is trained.

Lives here: which parameters decay, which share their second moment, and which implementation of
AdamW is taken. Called by `train` after sharding. Must never: project (the model does) or schedule
(the loop sets the rate).

Weight decay with parameterization exact pulls the update towards zero, that is, the weights towards
the base model. Norms and biases that are trained outside the targets do not decay, as is usual in
full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from osft_trainer.config import TrainingParameters
from osft_trainer.experts import TRAINED_SUFFIX
from osft_trainer.moments import SharedMoment, SubspaceAdamW


def build_optimizer(
    trainables: Mapping[str, nn.Parameter],
    training: TrainingParameters,
    others: Collection[str] = (),
    shared: Mapping[str, SharedMoment] | None = None,
) -> SubspaceAdamW:
    """AdamW in float32 over all trainables.

    Args:
        trainables: parameters by name, at least one; DTensors when sharded.
        training: betas, eps, weight_decay.
        others: original names of the trained parameters that are no target.
        shared: by name, factors whose gradients are projected; see `OSFTModel.shared_moments`.
    """
    together = {trainables[name]: moment for name, moment in (shared or {}).items()}
    plain = [name for name, p in trainables.items() if p.dim() <= 1 and _is_one_of(name, others)]
    rest = [p for name, p in trainables.items() if name not in plain]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p not in together], "weight_decay": training.weight_decay},
        {"params": [*together], "weight_decay": training.weight_decay},
        {"params": [trainables[name] for name in plain], "weight_decay": 0.0},
    ]
    on_cuda = all(p.device.type == "cuda" for p in trainables.values())
    return SubspaceAdamW(
        [group for group in groups if group["params"]],
        together,
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        # One kernel on CUDA. Elsewhere the plain loop, whose sums do not depend on grouping.
        fused=on_cuda,
        foreach=False if not on_cuda else None,
    )


def _is_one_of(name: str, others: Collection[str]) -> bool:
    """Whether it is one of these, also where a float32 master stands for it."""
    return name in others or name.removesuffix(f"{TRAINED_SUFFIX}.value") in others


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate

"""mini_trainer 0.9.0 as a peer on CUDA; `pip install rhai-innovation-mini-trainer==0.9.0` first.

Built by its own set-up functions, stepped by its own optimizer wrapper. TESTING=true makes it take
torch's attention instead of the flash-attn package. It has not run yet: it needs a CUDA device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.methods import Method, Setting, timed

INSTALL = "pip install rhai-innovation-mini-trainer==0.9.0"


def is_installed() -> bool:
    """Whether the peer can take part."""
    return importlib.util.find_spec("mini_trainer") is not None


@dataclass
class _Peer(Method):
    """Its optimizer projects inside of its own step."""

    own: Any = None

    def __post_init__(self) -> None:
        self.optimizer = self.own

    def step(self, tokens: Tensor) -> float:
        loss = self.module(input_ids=tokens, labels=tokens).loss.float().sum() / tokens.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def build(setting: Setting) -> Method:
    """Its OSFT model in float32 masters, as its command line sets it up."""
    os.environ["TESTING"] = "true"
    from mini_trainer.none_reduction_losses import hf_fixed_cross_entropy_none_reduction
    from mini_trainer.setup_model_for_training import setup_model, setup_training_components
    from mini_trainer.utils import patch_target_module

    if not dist.is_initialized():
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
        os.environ.update({**place, **address})
        dist.init_process_group("nccl")
    patch_target_module(
        "transformers.loss.loss_utils.fixed_cross_entropy", hf_fixed_cross_entropy_none_reduction
    )
    seconds: dict[str, float] = {}
    with timed(seconds, "load", setting.world):
        model = setup_model(
            model_name_or_path=str(setting.base),
            use_liger_kernels=setting.liger,
            osft=True,
            osft_rank_ratio=1 - setting.ratio,  # the share that it keeps
            local_rank=0,
        )
    with timed(seconds, "decompose", setting.world):
        model, optimizer, _ = setup_training_components(
            model, learning_rate=1e-5, num_warmup_steps=0, lr_scheduler="constant"
        )
    return _Peer(
        setting,
        lambda ids, positions: torch.zeros(()),
        {name: p for name, p in model.named_parameters() if p.requires_grad},
        model,
        _export(model),
        seconds=seconds,
        own=optimizer,
    )


def _export(model: nn.Module) -> Callable[[Path], object]:
    def export(folder: Path) -> None:
        raise NotImplementedError("its export runs inside its own training loop only")

    return export

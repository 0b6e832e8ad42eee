"""A step queues its work and asks the device for nothing, until the norm is needed.

On the meta device every question (`item`, `nonzero`, a mask as an index, the truth of a tensor)
raises, and so does a tensor that was left on the CPU. The test marked `gpu` asks CUDA itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from osft_trainer import attention
from osft_trainer.blocks import enable_activation_checkpointing
from osft_trainer.loop import backward
from osft_trainer.memory import converted
from osft_trainer.model import ROUNDING_STEPS, OSFTModel, convert
from osft_trainer.optimizer import build_optimizer
from osft_trainer.packing import GlobalBatch, collate
from osft_trainer.parallel import World
from osft_trainer.targets import plan_targets
from tiny_models import FAMILIES, packed_batch, tiny_model

LENGTHS = [9, 16, 5]
META = torch.device("meta")


def batch_of_two_passes() -> GlobalBatch:
    """As the loop gets it."""
    row = packed_batch(LENGTHS)
    ids, labels = (torch.split(row[name][0], LENGTHS) for name in ("input_ids", "labels"))
    micro = collate(list(zip(ids, labels, strict=True)))
    return GlobalBatch(0, 0, (micro, micro), 6, 60, 2 * micro.loss_tokens, False)


def step(model: OSFTModel, device: torch.device) -> Tensor:
    """All of a step of `loop` but the norm and what becomes of it; the sum of losses."""
    told = tiny.training(Path("m"), Path("d"), Path("o"))
    optimizer = build_optimizer(
        model.trainables(), told, model.plan.trained_others, model.shared_moments()
    )
    loss_sum = backward(model, batch_of_two_passes(), World(0, 0, 1, device))
    model.project_gradients()
    if device != META:  # AdamW has no way there
        optimizer.step()
    model.finish_step(1)
    model.finish_step(ROUNDING_STEPS)
    optimizer.zero_grad(set_to_none=True)
    return loss_sum


@pytest.mark.parametrize("parameterization", ["exact", "core", "factored", "dense"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_nothing_is_asked_of_the_device(
    family: str, parameterization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = attention._by_kernel
    monkeypatch.setattr(
        attention,
        "_one_by_one",
        lambda q, k, v, borders, *more: kernel(q, k, v, borders, 16, *more),
    )
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**values)
    with META:
        hf = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    others = "all" if parameterization == "dense" else "norms"
    plan = plan_targets(hf.train(), 0.5, parameterization, other_parameters=others)
    attention.select(hf)
    enable_activation_checkpointing(hf)
    assert step(converted(hf, plan), META).device == META


@contextmanager
def forbidding_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("parameterization", ["exact", "factored"])
def test_cuda_is_not_waited_for(parameterization: str) -> None:
    """Without Liger, whose fused loss counts labels on the device and waits for their number."""
    device = torch.device("cuda", 0)
    hf = tiny_model("llama").to(torch.bfloat16).train()
    assert attention.use_variable_length(hf, device) is None
    enable_activation_checkpointing(hf)
    model = convert(hf, plan_targets(hf, 0.5, parameterization, other_parameters="norms"))
    model.to(device)
    run = partial(step, model, device)
    run()  # kernels are loaded, memory is taken
    with warnings.catch_warnings(), forbidding_to_wait():
        warnings.simplefilter("ignore")  # the mode is a prototype, and says so
        loss_sum = run()
    assert torch.isfinite(loss_sum)

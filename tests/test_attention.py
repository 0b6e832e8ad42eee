"""Attention of packed rows from the samples' borders, beside transformers' own dense mask.

What runs on the CPU is all but the kernel itself: which tokens see which, the way through each
family's code, and the choice. Tests marked `gpu` run the kernel.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osft_trainer import attention, layout
from osft_trainer.attention import sample_lengths, select, use_variable_length
from osft_trainer.forward import packed_forward, packed_loss
from tiny_models import FAMILIES, packed_batch, tiny_model

LENGTHS = [7, 1, 9, 5]
CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.mark.parametrize("window", [None, 1, 4])
def test_borders_let_each_token_see_what_the_dense_mask_lets_it_see(window: int | None) -> None:
    """Values that are unit vectors turn the output into the attention's weights."""
    total = sum(LENGTHS)
    sample = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    place = torch.arange(total)
    seen = (sample[:, None] == sample) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, total, total).unbind()
    value = torch.eye(total).expand(1, 2, total, total)
    borders = torch.tensor([0, 7, 8, 17, 22], dtype=torch.int32)[None, None, None]
    out, _ = attention.variable_length_attention(
        nn.Module(), query, key, value, borders, sliding_window=window
    )
    weights = out[0].transpose(0, 1)
    assert torch.equal(weights > 0, seen.expand_as(weights))
    scores = (query @ key.mT / total**0.5)[0].masked_fill(~seen, float("-inf"))
    assert torch.allclose(weights, scores.softmax(-1), atol=1e-6)


def test_lengths_are_read_off_the_positions() -> None:
    batch = packed_batch(LENGTHS)
    assert sample_lengths(batch["position_ids"]) == LENGTHS
    assert sample_lengths(torch.arange(3, 8)[None]) == [5]


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the packed loss, for every parameter."""
    model.zero_grad()
    packed_loss(model, **batch).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2"}))
def test_every_family_gives_the_same_as_with_a_dense_mask(family: str) -> None:
    dense = tiny_model(family)
    other = copy.deepcopy(dense)
    select(other)
    batch = packed_batch(LENGTHS)
    row = (batch["input_ids"], batch["position_ids"])
    assert torch.allclose(packed_forward(other, *row), packed_forward(dense, *row), atol=1e-4)
    wanted, found = gradients(dense, batch), gradients(other, batch)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-3), name


def test_known_lengths_give_the_same_loss() -> None:
    model = tiny_model("llama")
    select(model)
    batch = packed_batch(LENGTHS)
    assert torch.equal(packed_loss(model, **batch, lengths=LENGTHS), packed_loss(model, **batch))
    wrong = packed_loss(model, **batch, lengths=[sum(LENGTHS)])
    assert not torch.allclose(wrong, packed_loss(model, **batch))


def test_rows_that_are_not_packed_keep_their_mask() -> None:
    """A padded batch, as generation gives it."""
    dense = tiny_model("mistral")
    other = copy.deepcopy(dense)
    select(other)
    ids = packed_batch([12])["input_ids"].view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wanted = dense(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    found = other(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert attention.NAME not in str(other.config.to_dict())


@pytest.mark.parametrize(
    ("family", "changes", "device", "words"),
    [
        ("llama", {}, "cpu", "needs CUDA and this run uses cpu"),
        ("gemma2", {}, "cuda", "gemma2 has eager attention only"),
        ("gpt2", {"attn_pdrop": 0.1}, "cuda", "drops out 0.1 of its attention"),
        ("llama", {"attention_dropout": 0.2}, "cuda", "drops out 0.2 of its attention"),
        (
            "qwen2_moe",
            {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            "cuda",
            "does not tell its sliding window",
        ),
    ],
)
def test_the_reason_for_a_dense_mask_is_told(
    family: str, changes: dict[str, object], device: str, words: str
) -> None:
    model = tiny_model(family, **changes)
    reason = use_variable_length(model, torch.device(device))
    assert reason is not None
    assert reason.startswith("packed samples are kept apart by a dense mask: ")
    assert words in reason
    assert model.config._attn_implementation != attention.NAME


def test_a_kernel_without_grouped_heads_leaves_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch 2.11 has it."""

    def old_kernel(
        query: Tensor, key: Tensor, value: Tensor, *borders: object, scale: object,
        window_size: object,
    ) -> Tensor:  # fmt: skip
        return query

    model = tiny_model("llama")
    monkeypatch.setattr(attention, "varlen_attn", old_kernel)
    monkeypatch.setattr(attention, "_unusable", lambda model, device: None)
    reason = str(use_variable_length(model, torch.device("cpu")))
    assert reason.startswith("packed samples are kept apart by a dense mask: torch's")
    assert "enable_gqa" in reason
    assert model.config._attn_implementation == "sdpa"


def test_a_family_that_is_not_packed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PACKED_FAMILIES", frozenset())
    reason = use_variable_length(tiny_model("llama"), torch.device("cuda"))
    assert reason == "samples of llama are padded, not packed"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_the_kernel_agrees_with_the_dense_mask(family: str) -> None:
    """On CUDA in bfloat16; the weights are larger than a real model's, so is the rounding."""
    dense = tiny_model(family).to(CUDA, torch.bfloat16)
    other = copy.deepcopy(dense)
    assert use_variable_length(other, CUDA) is None
    batch = {name: part.cuda() for name, part in packed_batch(LENGTHS).items()}
    assert float(packed_loss(other, **batch)) == pytest.approx(
        float(packed_loss(dense, **batch)), rel=0.03
    )
    wanted, found = gradients(dense, batch), gradients(other, batch)
    flat = [torch.cat([g[name].float().flatten() for name in wanted]) for g in (wanted, found)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.98


@pytest.mark.gpu
@needs_cuda
def test_the_kernel_needs_no_memory_for_a_mask() -> None:
    """A dense mask of 16384 tokens alone takes 256 MB as booleans."""
    total = 16384
    model = tiny_model("llama", max_position_embeddings=total).to(CUDA, torch.bfloat16)
    batch = {name: part.cuda() for name, part in packed_batch([512] * (total // 512)).items()}
    peaks = []
    for take in (lambda model: None, select):
        take(model)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        packed_loss(model, **batch).backward()  # type: ignore[no-untyped-call]
        peaks.append(torch.cuda.max_memory_allocated() - before)
        model.zero_grad()
    assert peaks[0] - peaks[1] > total * total // 2, peaks

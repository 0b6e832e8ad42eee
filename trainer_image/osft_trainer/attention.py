"""Attention over samples packed into one row, without a mask of T x T.

What lives here: the attention that `forward` asks for on CUDA, torch's own variable-length kernel,
and the choice whether a model takes it. Called by `assembly` (the choice) and `forward` (what a
packed row passes to the model). Must never: need a package beside torch and transformers, or change
what a model does outside of packed rows (generation keeps `sdpa`).

A row of T tokens in N samples is described by N + 1 borders (`cu_seqlens`): sample i owns the
tokens from border i to border i + 1, and each sees the earlier ones of its own sample, or the last
`sliding_window` of them. The borders travel as the 4-D attention mask that transformers hands from
the model to the attention function untouched. Time then follows the sum of squared lengths, not T
squared, and no T x T mask exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from osft_trainer.layout import layout_of

NAME = "osft_variable_length"
"""The attention's name in transformers' registry and in a model's configuration."""

NEEDS_WINDOW_ARGUMENT = frozenset({"qwen2_moe"})
"""Families that tell a sliding window to the mask alone."""


def use_variable_length(model: PreTrainedModel, device: torch.device) -> str | None:
    """Let packed rows of this model take the variable-length kernel.

    Returns:
        None when they do, else one line why they do not, for the caller to log.
    """
    if layout_of(model.config).is_padded:
        return f"samples of {model.config.model_type} are padded, not packed"
    reason = _unusable(model, device) or _failure_of_kernel(model, device)
    if reason is not None:
        return f"packed samples are kept apart by a dense mask: {reason}"
    select(model)
    return None


def select(model: PreTrainedModel) -> None:
    """Make it the model's attention, on any device."""
    AttentionInterface.register(NAME, variable_length_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def packed_arguments(
    model: PreTrainedModel, position_ids: Tensor, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """What a packed row passes to the model beside its ids; nothing with another attention.

    Args:
        model: a transformers model.
        position_ids: [1, T], 0 where a sample begins.
        lengths: of the samples, if the caller knows them; else a device is waited for.
    """
    if model.config._attn_implementation != NAME:
        return {}
    lengths = sample_lengths(position_ids) if lengths is None else lengths
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    on_device = borders.to(position_ids.device, non_blocking=True)
    return {"attention_mask": on_device[None, None, None], "max_length_q": max(lengths)}


def sample_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the samples of a packed row, [1, T]."""
    starts: list[int] = (position_ids[0] == 0).nonzero().flatten().tolist()
    starts = starts if starts and starts[0] == 0 else [0, *starts]
    ends = [*starts[1:], position_ids.shape[1]]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def variable_length_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query [1, heads, T, head_dim] to [1, T, heads, ...].

    `attention_mask` holds the borders ([1, 1, 1, N + 1], int32); any other mask, or none, is for
    `sdpa`. Where the kernel is not there (CPU), the samples are gone through one by one.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return cast(
            tuple[Tensor, None],
            sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **others
            ),
        )
    assert dropout == 0.0, "models with attention dropout keep a dense mask"
    unheard = [name for name in ("softcap", "s_aux") if others.get(name) is not None]
    assert not unheard, unheard
    borders, longest = attention_mask[0, 0, 0], max_length_q or query.shape[2]
    heads = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    if query.device.type == "cuda":
        out = _by_kernel(*heads, borders, longest, scaling, sliding_window)
    else:
        out = _one_by_one(*heads, borders, scaling, sliding_window)
    return out[None], None


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """[T, heads, head_dim] each."""
    out = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        # How many earlier tokens, beside itself, a token sees; and no later one.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, out)


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """The same, sample after sample."""
    places: list[int] = borders.tolist()
    found = []
    for begin, end in pairwise(places):
        q, k, v = (part[begin:end].transpose(0, 1)[None] for part in (query, key, value))
        rows = torch.arange(end - begin, device=query.device)
        distance = rows[:, None] - rows
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


def _unusable(model: PreTrainedModel, device: torch.device) -> str | None:
    """What in the model speaks against it."""
    config = model.config
    if device.type != "cuda":
        return f"variable-length attention needs CUDA and this run uses {device.type}"
    if config._attn_implementation != "sdpa":
        return f"{config.model_type} has {config._attn_implementation} attention only"
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windows and config.model_type in NEEDS_WINDOW_ARGUMENT:
        return f"{config.model_type} does not tell its sliding window to the attention function"
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    return f"this model drops out {dropout} of its attention" if dropout else None


def _failure_of_kernel(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why the kernel refuses this model's heads, type or device; found out by a small pass."""
    config = model.config
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    query, key, value = (
        torch.zeros(2, count, width, dtype=model.dtype, device=device, requires_grad=True)
        for count in (heads, groups, groups)
    )
    borders = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    try:
        out = _by_kernel(query, key, value, borders, 1, None, None)
        out.sum().backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
    # Whatever a kernel says about a shape, a type or a GPU it was not built for, and what Python
    # says where this torch's kernel is too old for an argument (`enable_gqa` came with 2.12).
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return f"torch's variable-length attention refuses it ({str(error).splitlines()[0]})"
    return None

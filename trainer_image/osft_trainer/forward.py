"""From a row of packed samples to logits or to a sum of token losses.

What lives here: how samples packed into one row are kept apart (attention, positions, labels), the
loss without full float32 logits, and evaluation mode for a while. Called by `model.OSFTModel` and
by what only measures. Must never: average (the caller divides by the global token count), or know
about optimizers.

A packed row is input_ids, position_ids and labels of shape [1, T]; position_ids restart at 0 where
a sample begins. For the families that keep samples of a row apart (`layout`, each one tested) the
attention takes the borders of the samples (`attention`, on CUDA), or transformers builds a mask per
sample from position_ids when no attention_mask is given. Every other family gets a right-padded
batch with an attention mask: slower, correct for all causal models. A row whose samples may not
share a pass is run in several: under FSDP rows are planned so (`bins`) that none is.

The balancing loss of expert models is not added: routers are frozen, so it could only move other
weights to fit a router that does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from osft_trainer.attention import packed_arguments, sample_lengths
from osft_trainer.layout import Layout, layout_of
from osft_trainer.ropes import reset_ropes

IGNORED = -100
"""Label that does not count."""

_CHUNK_TOKENS = 1024
"""Labelled tokens whose logits exist at one time."""


@dataclass(frozen=True)
class Head:
    """How a family turns hidden states into logits: softcap(scale * (hidden W^T + b))."""

    projection: nn.Module
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of [N, hidden]."""
        logits: Tensor = self.projection(hidden).float() * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and recomputation inside; afterwards every module is in its own mode again.

    Recomputation would run a block's hooks twice.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def packed_forward(hf: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Logits [1, T, vocabulary] in the model's dtype; samples do not see one another."""
    parts = _passes(hf, position_ids)
    if parts is not None:
        rows = [packed_forward(hf, input_ids[:, at], position_ids[:, at])[0] for at in parts]
        return torch.cat(rows)[torch.cat(parts).argsort()][None]
    reset_ropes(hf)
    if not layout_of(hf.config).is_padded:
        packed = packed_arguments(hf, position_ids)
        out = hf(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packed)
        return cast(Tensor, out.logits)
    batch, mask = _unpack(input_ids, position_ids)
    out = hf(input_ids=batch, attention_mask=mask, use_cache=False)
    return cast(Tensor, out.logits)[mask.bool()][None]


def hidden_passes(
    hf: PreTrainedModel, input_ids: Tensor, position_ids: Tensor
) -> Iterator[Callable[[], None]]:
    """What runs the decoder alone over a row, for whoever listens to its modules: no logits.

    No padding is run through it either: a family that cannot be packed gets its samples one by one.
    """
    layout = layout_of(hf.config)
    if layout == Layout():
        yield partial(_run_decoder, hf, input_ids, position_ids)
        return
    lengths = sample_lengths(position_ids)
    passes = [[n] for n in range(len(lengths))] if layout.is_padded else layout.passes(lengths)
    for at in _places(lengths, passes, input_ids.device):
        yield partial(_run_decoder, hf, input_ids[:, at], position_ids[:, at])


def packed_hidden(hf: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> None:
    """Run the decoder alone over a whole row; see `hidden_passes`."""
    for run in hidden_passes(hf, input_ids, position_ids):
        run()


def _run_decoder(hf: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> None:
    reset_ropes(hf)
    if layout_of(hf.config).is_padded:
        hf.base_model(input_ids=input_ids, use_cache=False)
        return
    packed = packed_arguments(hf, position_ids)
    hf.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packed)


def _passes(
    hf: PreTrainedModel, position_ids: Tensor, lengths: Sequence[int] | None = None
) -> list[Tensor] | None:
    """Places in the row of what goes through the model together; None where all of it may."""
    layout = layout_of(hf.config)
    if layout.alike_up_to is None:
        return None
    lengths = sample_lengths(position_ids) if lengths is None else lengths
    passes = list(layout.passes(lengths))
    return None if len(passes) == 1 else _places(lengths, passes, position_ids.device)


def _places(
    lengths: Sequence[int], passes: Iterable[Sequence[int]], device: torch.device
) -> list[Tensor]:
    """Of each pass the places in the row of its samples' tokens."""
    samples = torch.split(torch.arange(sum(lengths), device=device), list(lengths))
    return [torch.cat([samples[number] for number in numbers]) for numbers in passes]


def packed_loss(
    hf: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    fused: bool = False,
    lengths: Sequence[int] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Sum over labelled tokens of -log p(next token), a float32 scalar; 0 when none is labelled.

    `fused` takes Liger's fused projection and cross entropy (CUDA only); `lengths` of the samples
    and the `places` in the row whose next token is labelled spare waits for the device, where they
    are known.
    """
    parts = _passes(hf, position_ids, lengths)
    if parts is not None:
        alone = [(input_ids[:, at], position_ids[:, at], labels[:, at]) for at in parts]
        return torch.stack([packed_loss(hf, *row, fused) for row in alone]).sum()
    reset_ropes(hf)
    targets = next_token_labels(labels, position_ids)[0]
    if places is None:
        # Before the decoder: a device is waited for to learn how many there are, and what follows
        # could not be queued meanwhile.
        places = (targets != IGNORED).nonzero()[:, 0]
    targets = targets[places]
    if layout_of(hf.config).is_padded:
        logits = packed_forward(hf, input_ids, position_ids)[0]
        return cross_entropy(logits[places].float(), targets, reduction="sum")
    packed = packed_arguments(hf, position_ids, lengths)
    out = hf.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packed)
    hidden = out.last_hidden_state[0][places]
    head = head_of(hf)
    if hidden.shape[0] == 0:
        # Keeps the graph, so that a rank without work takes part in the backward of the others.
        return head.logits(out.last_hidden_state[0][:1]).sum() * 0.0
    if fused:
        return _fused_loss(head, hidden, targets)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, wanted in zip(
        torch.split(hidden, _CHUNK_TOKENS), torch.split(targets, _CHUNK_TOKENS), strict=True
    ):
        total = total + checkpoint(_chunk_loss, head, rows, wanted, use_reentrant=False)
    return total


def next_token_labels(labels: Tensor, position_ids: Tensor) -> Tensor:
    """Labels shifted to the position that predicts them; none crosses from sample to sample."""
    own = labels.masked_fill(position_ids == 0, IGNORED)
    return torch.cat([own[:, 1:], torch.full_like(own[:, :1], IGNORED)], dim=1)


def loss_tokens(labels: Tensor, position_ids: Tensor) -> int:
    """Number of labels that `packed_loss` counts."""
    return int((next_token_labels(labels, position_ids) != IGNORED).sum())


def head_of(hf: PreTrainedModel) -> Head:
    """The output projection and the family's scaling, from the configuration."""
    config = hf.config
    scale = 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(hf.get_output_embeddings(), scale, None if softcap is None else float(softcap))


def _chunk_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head.logits(hidden), targets, reduction="sum")


def _fused_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    # Imported here because Liger needs Triton, which machines without CUDA do not have.
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    bias = getattr(head.projection, "bias", None)
    assert bias is None or head.scale == 1.0, "no tested family scales a head with a bias"
    weight = head.projection.weight
    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden if head.scale == 1.0 else hidden * head.scale,
        weight,
        targets,
        bias,
        reduction="sum",
        softcap=head.softcap,
        # A trained head's gradient is added up over chunks of the row: in bfloat16 each sum rounds.
        accum_dtype=torch.float32 if weight.requires_grad else None,
    )
    return loss.float()


def _unpack(input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a packed row into a right-padded batch and its attention mask, [samples, longest]."""
    samples = torch.split(input_ids[0], sample_lengths(position_ids))
    batch = input_ids.new_zeros(len(samples), max(len(sample) for sample in samples))
    mask = torch.zeros_like(batch)
    for row, sample in enumerate(samples):
        batch[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    return batch, mask

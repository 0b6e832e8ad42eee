"""Free directions read off what a model's matrices see, instead of off the matrices.

Lives here: which targets are fed by one tensor, the second moments of these inputs over a text, and
the directions that the text uses least. Called by `decomposition` on the loaded model before
`convert`, and by the benchmark. Must never: change the model, choose ranks (`targets` does), or
read files.

A matrix W with inputs x gives W x. An update dW = F V_0, whose rows V_0 are orthonormal directions
that no x of the old text uses, leaves every W x of it as it is: dW x = F (V_0 x) = 0, layer after
layer, since then the next layer's inputs are the old ones, too. V_0 are the eigenvectors of
C = sum of x x^T with the smallest eigenvalues. The idea is that of Gradient Projection Memory (Saha
et al., 2021, section 4) and Adam-NSCL (Wang et al., 2021), put into OSFT's form: the update is
parameterised in the free space instead of projected into it.

C is summed in float64: a few channels of language models are thousands of times larger than the
rest, and float32 would round away what lies below 1e-7 of their squares. At most
`MOMENT_BYTES` of C exist at one time; the text is read again for the next matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osft_trainer.forward import evaluating, hidden_passes
from osft_trainer.parallel import World
from osft_trainer.targets import Plan, Target

MOMENT_BYTES = 4 * 2**30
"""Most that second moments hold at one time, unless a single matrix needs more: a 14336-wide input
needs 1.6 GB."""

EIGEN_WIDTH = 2048
"""Widest input whose moment is taken apart into eigenvectors: beyond, it costs minutes a matrix."""
_ROUNDS = 4
"""Of inverse iteration. On spectra that fall off, the energy left free is then 1.02 to 1.06 times
the smallest possible, 1.12 times on a flat one."""
_SHIFT = 1e-13
"""Added to a moment, relative to its mean eigenvalue, so that it can be inverted in float64."""

_NOT_FINITE = "an input holds NaN or infinity on the retention text; check the model's weights"

_ROWS_AT_ONCE = 4096
"""Inputs turned into float64 together."""

Row = tuple[Tensor, Tensor]
"""input_ids and position_ids, [1, T] each, as `forward` packs samples."""

_Sink = Callable[[Tensor], None]


@dataclass(frozen=True)
class InputGroup:
    """Targets that one and the same tensor is fed to: they share their free directions."""

    targets: tuple[Target, ...]

    @property
    def module(self) -> str:
        """Path of the module whose input stands for all."""
        return self.targets[0].module

    @property
    def width(self) -> int:
        """Length of the input."""
        return self.targets[0].kept_rank + self.targets[0].free_rank

    @property
    def rank(self) -> int:
        """Number of free directions."""
        return self.targets[0].free_rank


@dataclass(frozen=True)
class Moment:
    """What one input was over a text."""

    total: Tensor
    """Sum of x x^T, [width, width] float64."""
    inputs: int
    """How many x were added up."""


class _Reached(Exception):
    """The last input that is wanted was seen."""


def input_groups(hf: PreTrainedModel, plan: Plan, row: Row) -> list[InputGroup]:
    """Find which targets share their input, by watching one forward pass of a short row.

    In the order in which the pass reaches them; targets without free or without kept directions
    are left out, they need no bases.

    Raises:
        ValueError: if a target took no part in the pass.
    """
    wanted = [t for t in plan.targets if t.free_rank and t.kept_rank]
    seen: list[tuple[Tensor, list[Target]]] = []

    def look(target: Target) -> _Sink:
        def sink(x: Tensor) -> None:
            # Held tensors keep their identity: a freed one's place could be another's.
            for held, members in seen:
                if held is x:
                    members.append(target)
                    return
            seen.append((x, [target]))

        return sink

    _watch(hf, {t.module: look(t) for t in wanted}, [row], until=None)
    groups = [InputGroup(tuple(members)) for _, members in seen]
    reached = {t.name for group in groups for t in group.targets}
    unreached = [t.name for t in wanted if t.name not in reached]
    if unreached:
        raise ValueError(
            f"split_by: activations never saw an input of {unreached[0]}: leave it out by "
            "target_patterns, or set split_by to weights"
        )
    return groups


def in_passes(groups: Sequence[InputGroup]) -> Iterator[list[InputGroup]]:
    """Runs of groups whose second moments fit into `MOMENT_BYTES` together."""
    held: list[InputGroup] = []
    for group in groups:
        if held and sum(8 * g.width**2 for g in [*held, group]) > MOMENT_BYTES:
            yield held
            held = []
        held.append(group)
    if held:
        yield held


@torch.no_grad()
def second_moments(
    hf: PreTrainedModel, groups: Sequence[InputGroup], rows: Sequence[Row]
) -> list[Moment]:
    """Sum of x x^T over all inputs of the rows, and their number, for each group."""
    sums = [torch.zeros(g.width, g.width, dtype=torch.float64, device=hf.device) for g in groups]
    counts = [0] * len(groups)

    def add(number: int) -> _Sink:
        def sink(x: Tensor) -> None:
            for part in torch.split(x.flatten(0, -2), _ROWS_AT_ONCE):
                exact = part.double()
                sums[number].addmm_(exact.mT, exact)
                counts[number] += len(part)

        return sink

    sinks = {group.module: add(number) for number, group in enumerate(groups)}
    _watch(hf, sinks, rows, until=groups[-1].module)
    return [Moment(total, count) for total, count in zip(sums, counts, strict=True)]


@torch.no_grad()
def least_used(moment: Tensor, rank: int) -> Tensor:
    """V_0: the `rank` orthonormal directions with the smallest eigenvalues of a second moment.

    Up to `EIGEN_WIDTH` by eigenvectors. Wider ones by inverse iteration on random directions, which
    is made of the products that accelerators are fast at; near the cut it may take a direction for
    its neighbour, so the energy it leaves free is some per cent above the smallest possible.

    Returns:
        [rank, width], float32, contiguous; signs are fixed (largest entry of a row is positive).

    Raises:
        ValueError: if the moment holds NaN or infinity.
    """
    if not torch.isfinite(moment).all():
        raise ValueError(_NOT_FINITE)
    if len(moment) <= EIGEN_WIDTH:
        free = torch.linalg.eigh(moment).eigenvectors[:, :rank].mT
    else:
        free = _by_inverse_iteration(moment, rank).mT
    largest = torch.gather(free, 1, free.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = (free * largest.sign()).float().contiguous()
    return signed


def _by_inverse_iteration(moment: Tensor, rank: int) -> Tensor:
    """[width, rank] orthonormal: random directions, `_ROUNDS` times through the inverse."""
    width = len(moment)
    shift = max(float(moment.diagonal().mean()), 1e-300) * _SHIFT
    identity = torch.eye(width, dtype=moment.dtype, device=moment.device)
    for grown in (1.0, 1e2, 1e4):
        factor, failed = torch.linalg.cholesky_ex(moment + grown * shift * identity)
        if not failed:
            break
    else:
        raise ValueError(
            "the inputs on the retention text are too much alike to be told apart; give more text"
        )
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, rank, dtype=moment.dtype, generator=generator).to(moment.device)
    for _ in range(_ROUNDS):
        drawn = torch.linalg.qr(torch.cholesky_solve(drawn, factor)).Q
    return drawn


@torch.no_grad()
def used_share(
    hf: PreTrainedModel,
    groups: Sequence[InputGroup],
    bases: Sequence[Tensor],
    rows: Sequence[Row],
) -> list[float]:
    """Share of the inputs' energy that lies in the free directions: |V_0 x|^2 over |x|^2, summed.

    On text that the directions were not read off it says how much of the old an update can touch;
    `bases` are the groups' V_0.

    Raises:
        ValueError: if an input holds NaN or infinity.
    """
    sums = [torch.zeros(2, dtype=torch.float64, device=hf.device) for _ in groups]

    def add(total: Tensor, basis: Tensor) -> _Sink:
        exact = basis.to(hf.device, torch.float64)

        def sink(x: Tensor) -> None:
            for part in torch.split(x.flatten(0, -2), _ROWS_AT_ONCE):
                inputs = part.double()
                total[0] += (inputs @ exact.mT).square().sum()
                total[1] += inputs.square().sum()

        return sink

    sinks = {
        g.module: add(total, basis) for g, total, basis in zip(groups, sums, bases, strict=True)
    }
    _watch(hf, sinks, rows, until=groups[-1].module)
    if not all(bool(torch.isfinite(each).all()) for each in sums):
        raise ValueError(_NOT_FINITE)
    return [float(used / max(float(total), 1e-300)) for used, total in sums]


@contextmanager
def on_device(hf: PreTrainedModel, world: World) -> Iterator[None]:
    """The whole model on this rank's device, to be run before it is sharded.

    A model that does not fit there whole can only be split by its weights. Afterwards it holds the
    very memory that it held: weights mapped from their files stay shared by the ranks of a node.
    """
    parameters = [
        (module, name, parameter, parameter.data)
        for module in hf.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    buffers = [(module, *held) for module in hf.modules() for held in module._buffers.items()]
    hf.to(world.device)
    try:
        yield
    finally:
        for module, name, parameter, data in parameters:
            module._parameters[name] = parameter
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _watch(
    hf: PreTrainedModel, sinks: dict[str, _Sink], rows: Sequence[Row], until: str | None
) -> None:
    """Run the decoder over the rows and hand the inputs of modules to their sinks."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(hf))
        for path, sink in sinks.items():
            stack.enter_context(_listening(hf.get_submodule(path), sink, last=path == until))
        for input_ids, position_ids in rows:
            # Each pass ends by itself: what ends one must not take the row's other samples along.
            for part in hidden_passes(hf, input_ids.to(hf.device), position_ids.to(hf.device)):
                try:
                    part()
                except _Reached:
                    continue


@contextmanager
def _listening(module: nn.Module, sink: _Sink, last: bool) -> Iterator[None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        sink(inputs[0])
        if last:
            raise _Reached

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

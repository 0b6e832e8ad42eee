"""Which samples share a forward pass: bounds on what it holds, and rotary positions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drawn import examples
from osft_trainer import forward
from osft_trainer.bins import pack
from osft_trainer.evaluation import mean_loss
from osft_trainer.forward import packed_forward, packed_hidden, packed_loss
from osft_trainer.layout import Layout, layout_of
from osft_trainer.model import OSFTModel
from osft_trainer.packing import batches
from osft_trainer.parallel import World
from osft_trainer.prepared import PreparedPart
from osft_trainer.replay import Replay
from osft_trainer.retention import rows
from osft_trainer.targets import plan_targets
from packed_data import make_data
from tiny_models import packed_batch, tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))
PADDED = Layout(is_padded=True)
LAYOUTS = st.builds(
    Layout, st.booleans(), st.none() | st.integers(0, 120),
    st.sampled_from(["alike", "by length", "alone"]),
)  # fmt: skip


def held(lengths: list[int], layout: Layout) -> int:
    """Tokens of a pass."""
    if layout.is_padded:
        return len(lengths) * max(lengths, default=0)
    return sum(lengths)


def kind(length: int, layout: Layout, number: int) -> Any:
    """Samples of one kind may share a pass."""
    limit = layout.alike_up_to
    if limit is None or length <= limit:
        return "short"
    return {"alike": "long", "by length": length, "alone": -number - 1}[layout.beyond]


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(100, 300),
    LAYOUTS,
)
def test_no_pass_holds_more_than_the_limit_or_what_may_not_share_it(
    lengths: list[int], world_size: int, capacity: int, layout: Layout
) -> None:
    plan = pack(lengths, world_size, capacity, layout)
    assert sorted(at for bins in plan for members in bins for at in members) == list(
        range(len(lengths))
    )
    assert all(len(bins) == world_size for bins in plan)
    for members in (members for bins in plan for members in bins):
        assert held([lengths[at] for at in members], layout) <= capacity
        assert len({kind(lengths[at], layout, at) for at in members}) <= 1


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), LAYOUTS)
def test_a_row_is_run_in_as_few_passes_as_may_be(lengths: list[int], layout: Layout) -> None:
    found = list(layout.passes(lengths))
    kinds = [{kind(lengths[at], layout, at) for at in members} for members in found]
    assert all(len(each) == 1 for each in kinds)
    assert len(set.union(set(), *kinds)) == len(found)
    assert sorted(at for members in found for at in members) == list(range(len(lengths)))


def test_padding_is_spread_over_the_ranks() -> None:
    """As few rounds as the limit allows, and neither rank with nearly all of it."""
    plan = pack([50, 40, 30, 20, 10, 10], 2, 1000, PADDED)
    assert len(plan) == 1
    loads = [held([[50, 40, 30, 20, 10, 10][at] for at in members], PADDED) for members in plan[0]]
    assert loads == [120, 100]


@pytest.mark.parametrize("pieces", [None, [30, 2, 2, 2, 2, 2] * 9])
def test_every_pass_of_a_padded_family_stays_below_max_tokens_per_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[int] | None
) -> None:
    """In training, replay, validation and while reading; also of blocks with many short pieces."""
    lengths = np.random.default_rng(3).integers(2, 40, size=60).tolist()
    data = make_data(tmp_path / "prepared", lengths)
    if pieces is not None:
        ends = np.cumsum([0, *pieces])
        data = make_data(tmp_path / "blocks", [40] * 9)
        data._pieces = ends
    whole = PreparedPart(data, np.arange(len(data)))
    seen: list[int] = []
    layout = Layout(is_padded=True)
    tokens = 0
    found = batches(
        data,
        effective_batch_size=9,
        max_tokens_per_gpu=80,
        rank=0,
        world_size=2,
        seed=1,
        replay=Replay(whole, 0.5, 1),
        layout=layout,
    )
    for batch in islice(found, 6):
        for micro in batch.micro_batches:
            seen.append(held(list(micro.lengths), layout))
            tokens += 0 if micro.is_dummy else sum(micro.lengths)
    assert max(seen) <= 80
    assert tokens > 0
    model = tiny_model("llama")
    monkeypatch.setattr("osft_trainer.layout.PACKED_FAMILIES", frozenset())
    inside: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: inside.append(given["input_ids"].numel()), with_kwargs=True
    )
    osft = OSFTModel(model, plan_targets(model, 0.5))
    loss = mean_loss(osft, data, max_tokens_per_gpu=80, world=ALONE)
    assert 0 < max(inside) <= 80
    assert loss == pytest.approx(_one_by_one(model, whole), rel=1e-5)
    assert all(ids.shape[1] <= 80 for ids, _ in rows(whole, 80))


def _one_by_one(model: Any, data: PreparedPart) -> float:
    """Mean loss, each piece alone."""
    total, counted = 0.0, 0
    for index in range(len(data)):
        for ids, labels in data.pieces(index):
            positions = torch.arange(len(ids))[None]
            with torch.no_grad():
                total += float(packed_loss(model.eval(), ids[None], positions, labels[None]))
            counted += int((labels[1:] != -100).sum())
    return total / counted


LIMIT = 8
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
}  # fmt: skip


def turned(family: str, rope: str) -> Any:
    """A tiny model whose positions are turned in this way."""
    changes: dict[str, Any] = {"max_position_embeddings": LIMIT}
    changes["rope_parameters"] = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    if family == "phi3":
        changes["original_max_position_embeddings"] = LIMIT
    return tiny_model(family, **changes).eval()


def rope_alone(family: str, rope: str, ids: Tensor, lengths: list[int]) -> Tensor:
    """Each sample through a model that has seen none before."""
    parts = ids.split(lengths, dim=1)
    return torch.cat([turned(family, rope)(input_ids=part).logits[0] for part in parts])


@pytest.mark.parametrize(
    ("rope", "family", "is_padded"),
    [
        *((rope, "llama", False) for rope in ROPES),
        ("longrope", "phi3", False),
        ("longrope", "llama", True),
        ("dynamic", "llama", True),
    ],
)
@torch.no_grad()
def test_packed_samples_are_turned_as_each_alone(
    rope: str, family: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter and longer than the limit, in one row and in rows one after the other."""
    if is_padded:
        monkeypatch.setattr("osft_trainer.layout.PACKED_FAMILIES", frozenset())
    lengths = [5, 20, 3, 13, 8, 20]
    model = turned(family, rope)
    batch = packed_batch(lengths)
    ids, positions = batch["input_ids"], batch["position_ids"]
    wanted = rope_alone(family, rope, ids, lengths)
    for _ in range(2):  # what the first row leaves behind must not turn the second
        found = packed_forward(model, ids, positions)[0]
        assert (found - wanted).abs().max() < 1e-5
        packed_hidden(model, ids, positions)
    whole = packed_loss(model, **batch)
    parts = packed_batch(lengths)["labels"].split(lengths, dim=1)
    each = [
        packed_loss(turned(family, rope), part, torch.arange(part.shape[1])[None], labels)
        for part, labels in zip(ids.split(lengths, dim=1), parts, strict=True)
    ]
    assert torch.allclose(whole, torch.stack(each).sum(), rtol=1e-5)


def test_the_test_sees_what_one_row_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 20, 3]
    batch = packed_batch(lengths)
    ids, positions = batch["input_ids"], batch["position_ids"]
    monkeypatch.setattr(forward, "layout_of", lambda _: Layout())
    for rope, changes in {"linear": False, "longrope": True, "dynamic": True}.items():
        with torch.no_grad():
            found = packed_forward(turned("llama", rope), ids, positions)[0]
            apart = (found - rope_alone("llama", rope, ids, lengths)).abs().max()
        assert bool(apart > 1e-3) is changes, rope


@pytest.mark.parametrize(
    ("said", "layout"),
    [
        ({}, Layout()),
        ({"rope_parameters": {"rope_type": "yarn"}}, Layout()),
        ({"rope_scaling": {"type": "linear"}}, Layout()),
        ({"rope_parameters": {"rope_type": "dynamic"}}, Layout(False, 64, "by length")),
        (
            {"rope_parameters": {"full": {"rope_type": "longrope"}, "near": {"rope_type": "yarn"}},
             "original_max_position_embeddings": 16},
            Layout(False, 16, "alike"),
        ),
        ({"rope_scaling": {"type": "ours"}}, Layout(False, 0, "alone")),
        (
            {"rope_parameters": {"a": {"rope_type": "longrope",
                                       "original_max_position_embeddings": 8},
                                 "b": {"rope_type": "dynamic"}}},
            Layout(False, 8, "alone"),
        ),
        ({"model_type": "olmo2"}, Layout(is_padded=True)),
    ],
)  # fmt: skip
def test_the_layout_follows_from_the_configuration(said: dict[str, Any], layout: Layout) -> None:
    config = SimpleNamespace(**{"model_type": "llama", "max_position_embeddings": 64, **said})
    config.get_text_config = lambda: config
    assert layout_of(config) == layout

"""How samples may lie together in one forward pass of a model.

Lives here: what a family's attention and its kind of rotary positions allow, and what a pass of
given samples then holds. Called by `bins` and `packing`, which plan passes, and by `forward`, which
runs them. Pure: reads a configuration, knows neither tensors nor models. Must never: allow a pass
in which a sample is computed otherwise than alone.

Two things decide. The attention: families in `PACKED_FAMILIES` keep samples of one row apart, the
others get a batch padded to its longest sample. The positions: some kinds of rotary embedding turn
all positions of a pass by frequencies that follow from its longest sample, whatever the family.
`longrope` has one set for lengths up to a limit and one beyond, `dynamic` one for each length
beyond; the others have the same frequencies always (transformers, modeling_rope_utils).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PACKED_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite"}
    | {"gpt2", "mixtral", "qwen2_moe", "qwen3_moe"}
)
"""config.model_type values for which packing and the chunked head are tested."""

FIXED_ROPES = frozenset({"default", "linear", "yarn", "llama3", "proportional", "mrope"})
"""Kinds of rotary embedding whose frequencies no length changes."""


@dataclass(frozen=True)
class Layout:
    """Which samples may share a pass, and what it holds then."""

    is_padded: bool = False
    """Samples are the rows of a batch, each as long as the longest; else they lie end to end."""
    alike_up_to: int | None = None
    """Samples of at most so many tokens may share a pass; None: all may."""
    beyond: Literal["alike", "by length", "alone"] = "alike"
    """Which longer ones may: all of them, those of equal length, or none."""

    def may_share(self, one: int, other: int) -> bool:
        """Whether samples of these lengths may be in one pass."""
        limit = self.alike_up_to
        if limit is None or max(one, other) <= limit:
            return True
        if min(one, other) <= limit or self.beyond == "alone":
            return False
        return self.beyond == "alike" or one == other

    def tokens(self, count: int, total: int, longest: int) -> int:
        """Tokens of a pass of `count` samples with `total` tokens, padding included."""
        return count * longest if self.is_padded else total

    def takes_all(self, lengths: Sequence[int]) -> bool:
        """Whether samples of all these lengths may lie end to end in any company."""
        if self.is_padded:
            return False
        return self.alike_up_to is None or max(lengths, default=0) <= self.alike_up_to

    def passes(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of the samples that go through the model together; as few passes as may be."""
        left = list(range(len(lengths)))
        while left:
            first = left[0]
            together = [first] + [
                number for number in left[1:] if self.may_share(lengths[first], lengths[number])
            ]
            taken = set(together)
            left = [number for number in left if number not in taken]
            yield together


def layout_of(config: Any) -> Layout:
    """What a model of this configuration allows."""
    is_padded = config.model_type not in PACKED_FAMILIES
    limits = [_limit_of(rope, config) for rope in _ropes(config)]
    moving = [limit for limit in limits if limit is not None]
    if not moving:
        return Layout(is_padded)
    kinds = {beyond for _, beyond in moving}
    least = {limit for limit, _ in moving}
    if len(kinds) == 1 and len(least) == 1:
        return Layout(is_padded, *moving[0])
    # Two limits in one model: whatever is beyond the first of them goes alone.
    return Layout(is_padded, min(least), "alone")


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """What the configuration says of its rotary embeddings: of all layers, or by kind of layer."""
    text = config.get_text_config()
    found: list[Mapping[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        said = getattr(text, name, None)
        if isinstance(said, Mapping):
            by_layer = [each for each in said.values() if isinstance(each, Mapping)]
            found += by_layer or [said]
    return found


def _limit_of(
    rope: Mapping[str, Any], config: Any
) -> tuple[int, Literal["alike", "by length", "alone"]] | None:
    """Up to which length all is turned alike, and what holds beyond; None: always alike."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in FIXED_ROPES:
        return None
    text = config.get_text_config()
    if kind == "dynamic":
        return int(text.max_position_embeddings), "by length"
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        return int(original or text.max_position_embeddings), "alike"
    return 0, "alone"  # a model's own code may do anything

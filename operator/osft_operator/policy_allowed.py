"""What an administrator allows beyond the fixed rules: lists of patterns, read from the settings.

Base of settings.Settings and resolved.RenderSettings, so a list is spelt once and travels to where
it is judged; asked by policy and policy_pod. Pure. A pattern is a text in which `*` stands for any
characters. An empty list allows nothing; `*` alone allows everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

ANYTHING = ("*",)

Pattern = Annotated[str, Field(min_length=1, max_length=512)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=256)]


class Allowed(BaseModel):
    """The allow-lists, and the one image that needs no entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trainer_image: str = "osft-trainer:0.1.0"
    """Image of the trainer, for jobs that name none; also a job that names it may have it."""
    allowed_images: Patterns = ANYTHING
    """Images that OSFTJobs may name, as they write them, for instance `registry.example.com/*`."""
    allowed_service_accounts: Patterns = ()
    """Service accounts that training pods may run under; never with a token of the API server."""
    allowed_node_selectors: Patterns = ANYTHING
    """Labels of nodes that OSFTJobs may ask for, as `label=value` or `label` for any value."""
    allowed_priority_classes: Patterns = ANYTHING
    """PriorityClasses and Kueue's WorkloadPriorityClasses that OSFTJobs may name."""
    allowed_capabilities: Patterns = ()
    """Capabilities that containers may add, for instance IPC_LOCK for RDMA; Pod Security
    `restricted` refuses such pods."""
    allow_remote_code: bool = True
    """Whether jobs may run code that no image brings: that of a model (trustRemoteCode), commands,
    variables that load code."""


def may_run(image: str, allowed: Allowed) -> bool:
    """Whether a container may have an image: a listed one, or the administrator's own trainer."""
    return image == allowed.trainer_image or matches(image, allowed.allowed_images)


def matches(value: str, patterns: Sequence[str]) -> bool:
    """Whether a text is one of the patterns'."""
    return any(_is_matched(value, pattern) for pattern in patterns)


def words(patterns: Sequence[str]) -> str:
    """The patterns for people."""
    return ", ".join(patterns) if patterns else "none"


def is_any(patterns: Sequence[str]) -> bool:
    """Whether the patterns allow everything."""
    return "*" in patterns


def refused_labels(spec: Mapping[str, Any], patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Node labels a PodSpec asks for that no pattern allows, by its path below the PodSpec.

    Affinity counts like nodeSelector, or it would be the way around it.
    """
    if is_any(patterns):
        return
    selector = spec.get("nodeSelector")
    for label, value in (selector if isinstance(selector, dict) else {}).items():
        if not _allows(label, str(value), patterns):
            yield f"nodeSelector[{label}]", f"{label}={value}"
    affinity = spec.get("affinity")
    node = affinity.get("nodeAffinity") if isinstance(affinity, dict) else None
    for where, term in _terms(node, "affinity.nodeAffinity"):
        yield from _refused_by_term(where, term, patterns)


def _refused_by_term(
    where: str, term: Mapping[str, Any], patterns: Sequence[str]
) -> Iterator[tuple[str, str]]:
    if term.get("matchFields"):
        yield f"{where}.matchFields", "a node by name"
    expressions = term.get("matchExpressions")
    for index, each in enumerate(expressions if isinstance(expressions, list) else []):
        if not isinstance(each, dict):
            continue
        label, values = str(each.get("key")), each.get("values")
        # Only `In` says which values are meant; every other operator may mean any.
        wanted = values if each.get("operator") == "In" and isinstance(values, list) else [None]
        for value in wanted:
            if not _allows(label, None if value is None else str(value), patterns):
                text = f"{label} with any value" if value is None else f"{label}={value}"
                yield f"{where}.matchExpressions[{index}]", text


def _terms(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every NodeSelectorTerm and preference of a nodeAffinity, wherever it stands."""
    if isinstance(node, list):
        for index, entry in enumerate(node):
            yield from _terms(entry, f"{where}[{index}]")
    elif isinstance(node, dict):
        if "matchExpressions" in node or "matchFields" in node:
            yield where, node
        # Also below a term: what does not belong there must not hide what does.
        for key, value in node.items():
            yield from _terms(value, f"{where}.{key}")


def _allows(label: str, value: str | None, patterns: Sequence[str]) -> bool:
    """Whether a label with that value, or with any when None, is allowed."""
    for pattern in patterns:
        name, given, wanted = pattern.partition("=")
        if not _is_matched(label, name):
            continue
        if not given or wanted == "*" or (value is not None and matches(value, [wanted])):
            return True
    return False


def _is_matched(value: str, pattern: str) -> bool:
    """Whether a text is a pattern's. A regular expression could take for ever on a tenant's text.

    The first place where a piece fits is as good as any later one, so nothing is tried twice.
    """
    first, *pieces = pattern.split("*")
    if not pieces:
        return value == pattern
    last = pieces.pop()
    if not value.startswith(first):
        return False
    at = len(first)
    for piece in pieces:
        found = value.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return len(value) - at >= len(last) and value.endswith(last)

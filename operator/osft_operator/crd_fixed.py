"""The CRD's CEL rules that keep what defines a training as it was when the run started.

Called by crd. They compare an object with what it was before, so only the API server can check
them; decide never sees a change that they refuse.
"""

from __future__ import annotations

from pydantic.alias_generators import to_camel

from osft_operator.crd_rules import Rule
from osft_operator.spec_storage import Mount


def _fixed(path: str, same: str = "") -> Rule:
    """What defines the training does not change after the start."""
    parts = path.split(".")
    now, before = f"self.{path}", f"oldSelf.{path}"
    same = same or f"{now} == {before}"
    if parts[-1] in ("image", "nprocPerNode"):  # may be absent
        same = f"has({now}) == has({before}) && (!has({now}) || {same})"
    return Rule(
        "",
        f"!has(oldSelf.status) || !has(oldSelf.status.startTime) || ({same})",
        f"{path} is fixed once the run has started (status.startTime); delete the OSFTJob and "
        "create it anew, or create another",
        f".{path}",
    )


def _same_mounts() -> str:
    """CEL for equal mounts, where an absent field and its default are the same.

    The schema has no defaults inside of lists; an object may have them from elsewhere. Written so
    that the server sees the bounds of lists and texts, without which a rule costs too much.
    """
    now, before = "self.spec.storage.mounts", "oldSelf.spec.storage.mounts"
    same = []
    for name, info in Mount.model_fields.items():
        a, b = f"a.{to_camel(name)}", f"b.{to_camel(name)}"
        if isinstance(info.default, bool):
            absent = str(info.default).lower()
            same.append(f"(has({a}) ? {a} : {absent}) == (has({b}) ? {b} : {absent})")
        elif info.is_required():
            same.append(f"{a} == {b}")
        else:
            same.append(f"has({a}) == has({b}) && (!has({a}) || {a} == {b})")
    none = " && ".join(f"(!has({each}) || size({each}) == 0)" for each in (now, before))
    equal = f"{now}.all(a, {before}.exists(b, {' && '.join(same)}))"
    both = f"has({now}) && has({before}) && size({now}) == size({before})"
    return f"({none}) || ({both} && {equal})"


FIXED = [
    *map(
        _fixed,
        (
            "spec.training",
            "spec.nnodes",
            "spec.nprocPerNode",
            "spec.rendezvous",
            "spec.image",
            "spec.storage.checkpoints",
            "spec.storage.cache",
            "spec.onExistingRun",
        ),
    ),
    _fixed("spec.storage.mounts", _same_mounts()),
]

"""OSFTJobs for the tests: one that is valid, with changes by path; the form of a rule's samples.

The samples of all rules are in rule_samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]

MINIMAL: Object = {
    "apiVersion": "osft.dev/v1alpha1",
    "kind": "OSFTJob",
    "metadata": {"name": "sample"},
    "spec": {
        "training": {
            "modelPath": "/models/tiny",
            "dataPath": "/data/train.jsonl",
            "unfreezeRankRatio": 0.25,
            "effectiveBatchSize": 8,
            "maxTokensPerGpu": 1024,
            "maxSeqLen": 512,
            "learningRate": 5e-6,
        },
        "storage": {"checkpoints": {"size": "10Gi"}},
    },
}

GONE = object()
"""Takes a field away."""


def job(changes: dict[str, Any] | None = None, /, **metadata: Any) -> Object:
    """The minimal job with changes by path: `{"spec.training.maxSeqLen": 5}`."""
    body = copy.deepcopy(MINIMAL)
    body["metadata"].update(metadata)
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = body
        for part in parents:
            place = place.setdefault(part, {})
        if value is GONE:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return body


@dataclass(frozen=True)
class Sample:
    """A change that is accepted, a change that is refused, and what the refusal names."""

    name: str
    good: dict[str, Any]
    bad: dict[str, Any]
    field: str
    """Part of the path both refusals name."""
    words: str = field(default="", kw_only=True)
    """Words of the cure, in both refusals."""

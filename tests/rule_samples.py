"""Every rule of an OSFTJob with a good and a bad change; and what its schema alone says.

Used against the typed model and against the API server, which must agree.
"""

from __future__ import annotations

from job_samples import GONE, Sample
from rule_samples_pods import PODS
from rule_samples_training import TRAINING

T, S, C = "spec.training", "spec.storage", "spec.storage.checkpoints"

RULES = [*TRAINING, *PODS]
"""One or more for each CEL rule but those of immutability."""

SCHEMA = [
    Sample("unknown", {}, {f"{T}.learningRates": 1}, "learningRates"),
    Sample("snake", {}, {f"{T}.use_liger": True}, "use_liger"),
    Sample("unknown-spec", {}, {"spec.nodes": 1}, "nodes"),
    Sample("required", {}, {f"{T}.modelPath": GONE}, "modelPath"),
    Sample("blank", {f"{T}.modelPath": "/a b"}, {f"{T}.modelPath": " "}, "modelPath"),
    Sample("no-checkpoints", {}, {S: {}}, "checkpoints"),
    Sample(
        "ratio",
        {f"{T}.unfreezeRankRatio": 1},
        {f"{T}.unfreezeRankRatio": 1.01},
        "unfreezeRankRatio",
    ),
    Sample(
        "ratio-below",
        {f"{T}.unfreezeRankRatio": 0},
        {f"{T}.unfreezeRankRatio": -0.1},
        "unfreezeRankRatio",
    ),
    Sample("rate-zero", {f"{T}.learningRate": 1e-30}, {f"{T}.learningRate": 0}, "learningRate"),
    Sample("beta", {f"{T}.beta2": 0}, {f"{T}.beta2": 1}, "beta2"),
    Sample("integer", {f"{T}.maxSeqLen": 12}, {f"{T}.maxSeqLen": "12"}, "maxSeqLen"),
    Sample("fraction", {f"{T}.seed": 2**32 - 1}, {f"{T}.seed": 1.5}, "seed"),
    Sample("boolean", {f"{T}.useLiger": False}, {f"{T}.useLiger": "no"}, "useLiger"),
    Sample("enum", {f"{T}.onOverlong": "drop"}, {f"{T}.onOverlong": "Drop"}, "onOverlong"),
    Sample("null", {f"{T}.seed": None}, {f"{T}.seed": []}, "seed"),
    Sample(
        "patterns",
        {f"{T}.targetPatterns": [r"mlp\.(up|down)_proj$"]},
        {f"{T}.targetPatterns": []},
        "targetPatterns",
    ),
    Sample(
        "kwargs",
        {f"{T}.lrSchedulerKwargs": {"num_cycles": 0.5, "mode": "x"}},
        {f"{T}.lrSchedulerKwargs": [1]},
        "lrSchedulerKwargs",
    ),
    Sample("nodes", {"spec.nnodes": 1000}, {"spec.nnodes": 1001}, "nnodes"),
    Sample("processes", {"spec.nprocPerNode": 8}, {"spec.nprocPerNode": "auto"}, "nprocPerNode"),
    Sample("restarts", {"spec.maxRestarts": 99}, {"spec.maxRestarts": 100}, "maxRestarts"),
    Sample(
        "stall",
        {"spec.stall": {"timeoutSeconds": 60}},
        {"spec.stall": {"timeoutSeconds": 59}},
        "spec.stall.timeoutSeconds",
    ),
    Sample(
        "stall-action",
        {"spec.stall": {"timeoutSeconds": 600, "action": "Restart"}},
        {"spec.stall": {"timeoutSeconds": 600, "action": "Delete"}},
        "spec.stall.action",
    ),
    Sample("stall-time", {}, {"spec.stall": {"action": "Report"}}, "timeoutSeconds"),
    Sample("quantity", {f"{C}.size": "1.5Ti"}, {f"{C}.size": "10 GB"}, "size"),
    Sample(
        "limits",
        {"spec.resources": {"limits": {"nvidia.com/gpu": 8, "cpu": "500m"}}},
        {"spec.resources": {"limits": {"cpu": True}}},
        "spec.resources.limits",
    ),
    Sample(
        "limits-quantity",
        {"spec.resources": {"limits": {"cpu": "1.5", "memory": "16Gi"}}},
        {"spec.resources": {"limits": {"cpu": "many"}}},
        "spec.resources.limits",
    ),
    Sample(
        "limits-counted",
        {"spec.resources": {"limits": {"memory": "7Ei", "cpu": 10**17, "nvidia.com/gpu": "1e1"}}},
        {"spec.resources": {"limits": {"nvidia.com/gpu": "1e999"}}},
        "spec.resources.limits",
    ),
    Sample(
        "requests-counted",
        {"spec.resources": {"requests": {"cpu": "1e-9", "memory": "+.5Gi"}}},
        {"spec.resources": {"requests": {"memory": "8Ei"}}},
        "spec.resources.requests",
    ),
    Sample("relative", {f"{C}.mountPath": "/a"}, {f"{C}.mountPath": "a"}, "mountPath"),
    Sample(
        "grace",
        {"spec.terminationGracePeriodSeconds": 60},
        {"spec.terminationGracePeriodSeconds": 59},
        "terminationGracePeriodSeconds",
    ),
]
"""What the schema alone says."""

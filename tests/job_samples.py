"""OSFTJobs for the tests: one that is valid, and a good and a bad change for each rule.

Used against the typed model and against the API server, which must agree.
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


T, S, C = "spec.training", "spec.storage", "spec.storage.checkpoints"


def _mount(**changes: Any) -> list[Object]:
    mount = {"name": "data", "claimName": "data", "mountPath": "/data", **changes}
    return [{key: value for key, value in mount.items() if value is not GONE}]


RULES = [
    Sample(
        "name-length",
        {"metadata.name": "a" * 46},
        {"metadata.name": "a" * 47},
        "metadata.name",
        words="at most 46 characters",
    ),
    Sample(
        "name-letter",
        {"metadata.name": "a1"},
        {"metadata.name": "1a"},
        "metadata.name",
        words="begin with a letter",
    ),
    Sample(
        "name-dot",
        {"metadata.name": "a-b"},
        {"metadata.name": "a.b"},
        "metadata.name",
        words="lower case letters",
    ),
    Sample(
        "seq-len",
        {f"{T}.maxSeqLen": 1024},
        {f"{T}.maxSeqLen": 1025},
        T,
        words="lower maxSeqLen or raise maxTokensPerGpu",
    ),
    Sample(
        "split-parameterization",
        {f"{T}.splitBy": "activations"},
        {f"{T}.splitBy": "activations", f"{T}.parameterization": "core"},
        T,
        words="exact",
    ),
    Sample(
        "split-others",
        {f"{T}.splitBy": "activations", f"{T}.retentionDataPath": "/data/old.jsonl"},
        {f"{T}.splitBy": "activations", f"{T}.otherParameters": "norms"},
        T,
        words="frozen",
    ),
    Sample(
        "block-size",
        {f"{T}.isPretraining": True, f"{T}.blockSize": 8},
        {f"{T}.blockSize": 8},
        T,
        words="blockSize has no effect without isPretraining: set isPretraining",
    ),
    Sample(
        "document-column",
        {f"{T}.isPretraining": True, f"{T}.blockSize": 8, f"{T}.documentColumnName": "body"},
        {f"{T}.documentColumnName": "body"},
        T,
        words="documentColumnName has no effect without isPretraining: set isPretraining",
    ),
    Sample(
        "pretraining",
        {f"{T}.isPretraining": True, f"{T}.blockSize": 8},
        {f"{T}.isPretraining": True},
        T,
        words="isPretraining needs blockSize: set it",
    ),
    Sample(
        "block-fits",
        {f"{T}.isPretraining": True, f"{T}.blockSize": 8},
        {f"{T}.isPretraining": True, f"{T}.blockSize": 90_000_000},
        T,
        words="lower blockSize or raise maxSeqLen",
    ),
    Sample(
        "one-form",
        {f"{T}.useProcessedDataset": True},
        {f"{T}.useProcessedDataset": True, f"{T}.unmaskMessages": True},
        T,
        words="exclude one another: keep one",
    ),
    Sample(
        "blocks-are-never-overlong",
        {f"{T}.isPretraining": True, f"{T}.blockSize": 8},
        {f"{T}.isPretraining": True, f"{T}.blockSize": 8, f"{T}.onOverlong": "drop"},
        T,
        words="which cuts documents into blocks: remove it",
    ),
    Sample(
        "mode-epoch",
        {f"{T}.numEpochs": 2},
        {f"{T}.trainingMode": "step", f"{T}.maxSteps": 3, f"{T}.numEpochs": 2},
        T,
        words="trainingMode",
    ),
    Sample(
        "mode-step",
        {f"{T}.trainingMode": "step", f"{T}.maxSteps": 3},
        {f"{T}.trainingMode": "step"},
        T,
        words="trainingMode step needs maxSteps: set it",
    ),
    Sample(
        "mode-step-only",
        {f"{T}.trainingMode": "step", f"{T}.maxSteps": 3},
        {f"{T}.maxSteps": 3},
        T,
        words="remove it or change trainingMode",
    ),
    Sample(
        "mode-token",
        {f"{T}.trainingMode": "token", f"{T}.maxTokens": 3},
        {f"{T}.trainingMode": "token"},
        T,
        words="trainingMode token needs maxTokens: set it",
    ),
    Sample(
        "mode-token-only",
        {f"{T}.trainingMode": "token", f"{T}.maxTokens": 10**15},
        {f"{T}.maxTokens": 3},
        T,
        words="remove it or change trainingMode",
    ),
    Sample(
        "mode-infinite",
        {f"{T}.trainingMode": "infinite", f"{T}.lrScheduler": "constant"},
        {f"{T}.trainingMode": "infinite"},
        T,
        words="constant_with_warmup",
    ),
    Sample(
        "wandb-entity",
        {f"{T}.wandbEntity": "me", f"{T}.wandbProject": "p"},
        {f"{T}.wandbEntity": "me"},
        T,
        words="set wandbProject",
    ),
    Sample(
        "wandb-run",
        {f"{T}.wandbRunName": "me", f"{T}.wandbProject": "p"},
        {f"{T}.wandbRunName": "me"},
        T,
        words="set wandbProject",
    ),
    Sample(
        "mlflow-experiment",
        {f"{T}.mlflowExperimentName": "e", f"{T}.mlflowTrackingUri": "http://mlflow"},
        {f"{T}.mlflowExperimentName": "e"},
        T,
        words="set mlflowTrackingUri",
    ),
    Sample(
        "mlflow-run",
        {f"{T}.mlflowRunName": "r", f"{T}.mlflowTrackingUri": "http://mlflow"},
        {f"{T}.mlflowRunName": "r"},
        T,
        words="set mlflowTrackingUri",
    ),
    Sample(
        "validation-data",
        {f"{T}.validationDataPath": "/data/v.jsonl"},
        {f"{T}.validationDataPath": "/data/v.jsonl", f"{T}.validationSplit": 0.1},
        T,
        words="keep one of them",
    ),
    Sample(
        "validation-frequency",
        {f"{T}.validationFrequency": 5, f"{T}.validationSplit": 0.1},
        {f"{T}.validationFrequency": 5},
        T,
        words="set validationSplit or validationDataPath",
    ),
    Sample(
        "validation-epoch",
        {f"{T}.validateAtEpoch": True, f"{T}.validationDataPath": "/data/v.jsonl"},
        {f"{T}.validateAtEpoch": True},
        T,
        words="set validationSplit or validationDataPath",
    ),
    Sample(
        "validation-best",
        {f"{T}.saveBestValLoss": True, f"{T}.validationSplit": 0.1},
        {f"{T}.saveBestValLoss": True},
        T,
        words="set validationSplit or validationDataPath",
    ),
    Sample(
        "validation-threshold",
        {
            f"{T}.valLossImprovementThreshold": 0.1,
            f"{T}.saveBestValLoss": True,
            f"{T}.validationSplit": 0.1,
        },
        {f"{T}.valLossImprovementThreshold": 0.1, f"{T}.validationSplit": 0.1},
        T,
        words="set saveBestValLoss",
    ),
    Sample(
        "validation-never",
        {f"{T}.validationSplit": 0.1, f"{T}.validateAtFinal": True},
        {f"{T}.validationSplit": 0.1, f"{T}.validateAtFinal": False},
        T,
        words="never used",
    ),
    Sample(
        "folder",
        {f"{T}.ckptOutputDir": "/checkpoints/a/b"},
        {f"{T}.ckptOutputDir": "/other/a"},
        f"{T}.ckptOutputDir",
        words="remove it to use the default",
    ),
    Sample(
        "folder-climbs",
        {f"{T}.ckptOutputDir": "/checkpoints/..a"},
        {f"{T}.ckptOutputDir": "/checkpoints/a/../../b"},
        f"{T}.ckptOutputDir",
        words="without",
    ),
    Sample(
        "folder-itself",
        {f"{C}.mountPath": "/out", f"{T}.ckptOutputDir": "/out/x"},
        {f"{C}.mountPath": "/out", f"{T}.ckptOutputDir": "/out"},
        f"{T}.ckptOutputDir",
        words="remove it to use the default",
    ),
    Sample(
        "port",
        {"spec.rendezvous.port": 29500},
        {"spec.rendezvous.port": 28080},
        "spec.rendezvous",
        words="choose another",
    ),
    Sample(
        "one-source",
        {f"{C}.size": GONE, f"{C}.claimName": "mine"},
        {f"{C}.claimName": "mine"},
        C,
        words="exactly one of claimName",
    ),
    Sample("a-source", {}, {f"{C}.size": GONE}, C, words="exactly one of claimName"),
    Sample(
        "claim-size",
        {f"{C}.size": "0.5Ti"},
        {f"{C}.size": "0e5"},
        f"{C}",
        words="size must be more than nothing",
    ),
    Sample(
        "claim-class",
        {f"{C}.storageClassName": "fast"},
        {f"{C}.size": GONE, f"{C}.claimName": "m", f"{C}.storageClassName": "fast"},
        C,
    ),
    Sample(
        "claim-modes",
        {f"{C}.accessModes": ["ReadWriteMany"]},
        {f"{C}.size": GONE, f"{C}.claimName": "m", f"{C}.accessModes": ["ReadWriteMany"]},
        C,
    ),
    Sample(
        "checkpoints-path",
        {f"{C}.mountPath": "/a/..b"},
        {f"{C}.mountPath": "/a/../b"},
        C,
        words="must not contain `..`",
    ),
    Sample("checkpoints-sub-path", {f"{C}.subPath": "a/b"}, {f"{C}.subPath": "/a"}, C),
    Sample("checkpoints-sub-climb", {f"{C}.subPath": "a..b"}, {f"{C}.subPath": "a/.."}, C),
    Sample(
        "mount-source",
        {f"{S}.mounts": _mount()},
        {f"{S}.mounts": _mount(configMapName="also")},
        f"{S}.mounts",
        words="exactly one of claimName, configMapName, secretName",
    ),
    Sample(
        "mount-no-source",
        {f"{S}.mounts": _mount(claimName=GONE, secretName="s")},
        {f"{S}.mounts": _mount(claimName=GONE)},
        f"{S}.mounts",
        words="exactly one",
    ),
    Sample(
        "mount-name",
        {f"{S}.mounts": _mount(name="caches")},
        {f"{S}.mounts": _mount(name="cache")},
        f"{S}.mounts",
        words="choose another",
    ),
    Sample(
        "mount-path",
        {f"{S}.mounts": _mount(mountPath="/d/..x")},
        {f"{S}.mounts": _mount(mountPath="/d/..")},
        f"{S}.mounts",
        words="must not contain",
    ),
    Sample(
        "mount-sub-path",
        {f"{S}.mounts": _mount(subPath="x")},
        {f"{S}.mounts": _mount(subPath="../x")},
        f"{S}.mounts",
    ),
    Sample(
        "mount-twice",
        {f"{S}.mounts": _mount() + _mount(name="b", mountPath="/b")},
        {f"{S}.mounts": _mount() + _mount(name="b")},
        S,
        words="used twice",
    ),
    Sample(
        "mount-over-cache",
        {f"{S}.mounts": _mount(mountPath="/cache/hub")},
        {f"{S}.mounts": _mount(mountPath="/cache")},
        S,
        words="used twice",
    ),
    Sample(
        "mount-over-tmp",
        {f"{S}.mounts": _mount(mountPath="/tmp/x")},
        {f"{S}.mounts": _mount(mountPath="/tmp")},
        S,
    ),
    Sample(
        "cache-path",
        {f"{S}.cache": {"mountPath": "/scratch"}},
        {f"{S}.cache": {"mountPath": "/checkpoints"}},
        S,
    ),
    Sample(
        "cache-source",
        {f"{S}.cache": {"claimName": "c"}},
        {f"{S}.cache": {"claimName": "c", "sizeLimit": "1Gi"}},
        f"{S}.cache",
        words="exclude each other",
    ),
    Sample(
        "cache-climb",
        {f"{S}.cache": {"mountPath": "/c"}},
        {f"{S}.cache": {"mountPath": "/c/../d"}},
        f"{S}.cache",
    ),
    Sample(
        "env-reserved",
        {"spec.env": [{"name": "RANKS", "value": "1"}]},
        {"spec.env": [{"name": "RANK", "value": "1"}]},
        "spec.env",
        words="set by torchrun and the operators: remove it",
    ),
    Sample(
        "env-reserved-prefix",
        {"spec.env": [{"name": "MY_PET_NNODES", "value": "1"}]},
        {"spec.env": [{"name": "PET_NNODES", "value": "1"}]},
        "spec.env",
        words="remove it",
    ),
    Sample(
        "env-value",
        {"spec.env": [{"name": "A", "value": "1"}]},
        {
            "spec.env": [
                {
                    "name": "A",
                    "value": "1",
                    "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
                }
            ]
        },
        "spec.env",
        words="exclude each other",
    ),
    Sample(
        "env-source",
        {"spec.env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
        {"spec.env": [{"name": "A", "valueFrom": {}}]},
        "spec.env",
        words="exactly one",
    ),
    Sample(
        "env-from",
        {"spec.envFrom": [{"secretRef": {"name": "s"}}]},
        {"spec.envFrom": [{"prefix": "X"}]},
        "spec.envFrom",
        words="exactly one",
    ),
    Sample(
        "claim-retain",
        {C: {"claimName": "mine", "retain": True}},
        {C: {"claimName": "mine", "retain": False}},
        C,
        words="remove it",
    ),
    Sample(
        "claim-shared",
        {"spec.nnodes": 2, f"{C}.accessModes": ["ReadWriteOnce", "ReadWriteMany"]},
        {"spec.nnodes": 2, f"{C}.accessModes": ["ReadWriteOnce"]},
        "storage.checkpoints.accessModes",
        words="add ReadWriteMany, or remove accessModes",
    ),
    Sample(
        "shared-memory",
        {"spec.sharedMemory": {"sizeLimit": "1Gi"}},
        {"spec.sharedMemory": {"sizeLimit": "1Gi", "enabled": False}},
        "spec.sharedMemory",
        words="remove one of them",
    ),
]
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
    Sample("relative", {f"{C}.mountPath": "/a"}, {f"{C}.mountPath": "a"}, "mountPath"),
    Sample(
        "grace",
        {"spec.terminationGracePeriodSeconds": 60},
        {"spec.terminationGracePeriodSeconds": 59},
        "terminationGracePeriodSeconds",
    ),
]
"""What the schema alone says."""

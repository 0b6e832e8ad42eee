"""A good and a bad change for each rule about an OSFTJob's name and its training."""

from __future__ import annotations

from typing import Any

from job_samples import GONE, Object, Sample

T, S, C = "spec.training", "spec.storage", "spec.storage.checkpoints"


def _mount(**changes: Any) -> list[Object]:
    mount = {"name": "data", "claimName": "data", "mountPath": "/data", **changes}
    return [{key: value for key, value in mount.items() if value is not GONE}]


TRAINING = [
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
]

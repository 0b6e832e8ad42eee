"""The CRD's CEL rules: what a schema alone cannot say, each with the field and the cure.

Called by crd. The same rules stand in spec as Python, where CEL cannot run; test_crd_server holds
an accepted and a refused sample for each. A rule is checked by the API server at each write, so the
bounds of the schema keep its cost small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from osft_operator import names
from osft_operator.resources import (
    COUNTED_PATTERN,
    COUNTED_WORDS,
    FRACTION_PATTERN,
    WHOLE_WORDS,
)
from osft_trainer.config import ENDLESS_SCHEDULES
from osft_trainer.report import METRICS_PORT


@dataclass(frozen=True)
class Rule:
    """One `x-kubernetes-validations` entry."""

    at: str
    """Path of the schema it belongs to; `[]` is a list's item. Empty: the whole object."""
    rule: str
    """CEL."""
    message: str
    """What is wrong and what to do."""
    field: str = ""
    """Field below `at` that is named in the error."""

    def to_dict(self) -> dict[str, Any]:
        """The entry as it stands in the CRD."""
        entry = {"rule": self.rule, "message": self.message, "reason": "FieldValueInvalid"}
        return {**entry, "fieldPath": self.field} if self.field else entry


def _exactly_one(at: str, *fields: str) -> Rule:
    count = " + ".join(f"(has(self.{field}) ? 1 : 0)" for field in fields)
    return Rule(
        at,
        f"{count} == 1",
        f"exactly one of {', '.join(fields)} is needed: keep one of them",
        f".{fields[0]}",
    )


def _needs(at: str, field: str, other: str) -> Rule:
    return Rule(
        at,
        f"!has(self.{field}) || has(self.{other})",
        f"{field} has no effect without {other}: set {other}",
        f".{field}",
    )


def _excludes(at: str, field: str, other: str) -> Rule:
    return Rule(
        at,
        f"!has(self.{field}) || !has(self.{other})",
        f"{field} and {other} exclude each other: keep one of them",
        f".{field}",
    )


def _no_climb(at: str, field: str) -> Rule:
    return Rule(
        at,
        f"!has(self.{field}) || !self.{field}.matches('(^/|(^|/)[.][.](/|$))')"
        if field == "subPath"
        else f"!self.{field}.matches('(^|/)[.][.](/|$)')",
        f"{field} must not contain `..`"
        + (" or begin with /: write a path inside the volume" if field == "subPath" else ""),
        f".{field}",
    )


def _counted(at: str, field: str) -> Rule:
    """A size is one that Kubernetes can count."""
    return Rule(
        at,
        f"!has(self.{field}) || self.{field}.matches('{COUNTED_PATTERN}')",
        f"{field} {COUNTED_WORDS}",
        f".{field}",
    )


def _whole_gpus(field: str) -> Rule:
    """The commonest devices are whole; of all others, the operator says so.

    What a rule about all amounts could cost is more than Kubernetes before 1.34 takes: to it each
    may be as long as a request.
    """
    amount = f"self.{field}[a]"
    return Rule(
        "spec.resources",
        f"!has(self.{field}) || {list(GPUS)}.all(a, !(a in self.{field}) || type({amount}) == int "
        f"|| !{amount}.matches('{FRACTION_PATTERN}'))",
        f"in {field}, {WHOLE_WORDS}",
        f".{field}",
    )


TRAINING = "spec.training"
GPUS = ("nvidia.com/gpu", "amd.com/gpu")
CHECKPOINTS = "spec.storage.checkpoints"
MOUNT = "spec.storage.mounts[]"
CACHE = "spec.storage.cache"


def _limit(mode: str, field: str, needed: bool) -> list[Rule]:
    """A training mode has its limit, and no other mode has it."""
    own = Rule(
        TRAINING,
        f"self.trainingMode == '{mode}' || !has(self.{field})",
        f"{field} has an effect in trainingMode {mode} only: remove it or change trainingMode",
        f".{field}",
    )
    must = Rule(
        TRAINING,
        f"self.trainingMode != '{mode}' || has(self.{field})",
        f"trainingMode {mode} needs {field}: set it",
        f".{field}",
    )
    return [own, must] if needed else [own]


def _of_documents(field: str) -> Rule:
    return Rule(
        TRAINING,
        f"!has(self.{field}) || self.isPretraining",
        f"{field} has no effect without isPretraining: set isPretraining",
        f".{field}",
    )


_HAS_VALIDATION = "has(self.validationDataPath) || self.validationSplit > 0.0"

_RESERVED_VARIABLE = " || ".join(
    [
        *(f"self.name.startsWith('{prefix}')" for prefix in names.RESERVED_ENVIRONMENT_PREFIXES),
        f"self.name in {list(names.RESERVED_ENVIRONMENT)}",
    ]
)
_OWN_PATHS = f"[self.checkpoints.mountPath, self.cache.mountPath] + {list(names.RESERVED_PATHS)}"

RULES = [
    Rule(
        "",
        f"size(self.metadata.name) <= {names.MAX_NAME_LENGTH} && "
        f"self.metadata.name.matches('{names.NAME_PATTERN}')",
        "the name must be lower case letters, digits and `-`, begin with a letter, end with a "
        f"letter or digit, and have at most {names.MAX_NAME_LENGTH} characters: choose a shorter "
        "or plainer name",
        ".metadata.name",
    ),
    Rule(
        "spec",
        "!has(self.training.ckptOutputDir) || (self.training.ckptOutputDir.startsWith("
        "self.storage.checkpoints.mountPath + '/') && "
        "!self.training.ckptOutputDir.matches('(^|/)[.][.](/|$)'))",
        "ckptOutputDir must be a folder below storage.checkpoints.mountPath, without `..`: remove "
        "it to use the default",
        ".training.ckptOutputDir",
    ),
    Rule(
        "spec",
        "self.nnodes == 1 || !has(self.storage.checkpoints.accessModes) || "
        "'ReadWriteMany' in self.storage.checkpoints.accessModes",
        "with nnodes > 1 all nodes write to the claim: add ReadWriteMany, or remove accessModes",
        ".storage.checkpoints.accessModes",
    ),
    Rule(
        TRAINING,
        "self.maxSeqLen <= self.maxTokensPerGpu",
        "maxSeqLen must be at most maxTokensPerGpu: lower maxSeqLen or raise maxTokensPerGpu",
        ".maxSeqLen",
    ),
    Rule(
        TRAINING,
        "self.splitBy != 'activations' || self.parameterization == 'exact'",
        "splitBy activations frees directions of the inputs, only parameterization exact is made "
        "of them: use exact",
        ".parameterization",
    ),
    Rule(
        TRAINING,
        "self.splitBy != 'activations' || self.otherParameters == 'frozen'",
        "other parameters would change the inputs that splitBy activations relies on: use "
        "otherParameters frozen",
        ".otherParameters",
    ),
    _of_documents("blockSize"),
    _of_documents("documentColumnName"),
    Rule(
        TRAINING,
        "!self.isPretraining || has(self.blockSize)",
        "isPretraining needs blockSize: set it, for instance to maxSeqLen",
        ".blockSize",
    ),
    Rule(
        TRAINING,
        "!has(self.blockSize) || self.blockSize <= self.maxSeqLen",
        "blockSize must be at most maxSeqLen: lower blockSize or raise maxSeqLen",
        ".blockSize",
    ),
    Rule(
        TRAINING,
        "size([self.isPretraining, self.useProcessedDataset, self.unmaskMessages].filter(a, a))"
        " <= 1",
        "isPretraining, useProcessedDataset and unmaskMessages exclude one another: keep one",
        ".isPretraining",
    ),
    Rule(
        TRAINING,
        "!self.isPretraining || self.onOverlong == 'error'",
        "onOverlong has no effect with isPretraining, which cuts documents into blocks: remove it",
        ".onOverlong",
    ),
    Rule(
        TRAINING,
        "!self.selectiveActivationCheckpointing || self.activationCheckpointing",
        "selectiveActivationCheckpointing has no effect without activationCheckpointing: set "
        "activationCheckpointing",
        ".selectiveActivationCheckpointing",
    ),
    *_limit("epoch", "numEpochs", needed=False),
    *_limit("step", "maxSteps", needed=True),
    *_limit("token", "maxTokens", needed=True),
    Rule(
        TRAINING,
        f"self.trainingMode != 'infinite' || self.lrScheduler in {list(ENDLESS_SCHEDULES)}",
        "this schedule needs an end, trainingMode infinite has none: use one of "
        + ", ".join(ENDLESS_SCHEDULES),
        ".lrScheduler",
    ),
    _needs(TRAINING, "wandbEntity", "wandbProject"),
    _needs(TRAINING, "wandbRunName", "wandbProject"),
    _needs(TRAINING, "mlflowExperimentName", "mlflowTrackingUri"),
    _needs(TRAINING, "mlflowRunName", "mlflowTrackingUri"),
    Rule(
        TRAINING,
        "!has(self.validationDataPath) || self.validationSplit == 0.0",
        "validationSplit and validationDataPath exclude each other: keep one of them",
        ".validationSplit",
    ),
    *(
        Rule(
            TRAINING,
            f"{unused} || {_HAS_VALIDATION}",
            f"{field} has no effect without validation data: set validationSplit or "
            "validationDataPath",
            f".{field}",
        )
        for field, unused in (
            ("validationFrequency", "!has(self.validationFrequency)"),
            ("validateAtEpoch", "!self.validateAtEpoch"),
            ("saveBestValLoss", "!self.saveBestValLoss"),
        )
    ),
    Rule(
        TRAINING,
        "self.valLossImprovementThreshold == 0.0 || self.saveBestValLoss",
        "valLossImprovementThreshold has no effect without saveBestValLoss: set saveBestValLoss",
        ".valLossImprovementThreshold",
    ),
    Rule(
        TRAINING,
        f"!({_HAS_VALIDATION}) || has(self.validationFrequency) || self.validateAtEpoch || "
        "(self.validateAtFinal && self.trainingMode != 'infinite')",
        "the validation data is never used: set validationFrequency, validateAtEpoch or "
        "validateAtFinal (a run without end has no final step)",
        ".validateAtFinal",
    ),
    Rule(
        "spec.rendezvous",
        f"self.port != {METRICS_PORT}",
        f"port {METRICS_PORT} is the one of /metrics: choose another",
        ".port",
    ),
    _exactly_one(CHECKPOINTS, "claimName", "size"),
    Rule(
        CHECKPOINTS,
        "!has(self.size) || self.size.matches('^[+]?[0-9.]*[1-9]')",
        "size must be more than nothing: write for instance 100Gi",
        ".size",
    ),
    _counted(CHECKPOINTS, "size"),
    _excludes(CHECKPOINTS, "storageClassName", "claimName"),
    _excludes(CHECKPOINTS, "accessModes", "claimName"),
    Rule(
        CHECKPOINTS,
        "!has(self.claimName) || !has(self.retain) || self.retain",
        "retain: false has no effect with claimName, which always stays: remove it",
        ".retain",
    ),
    _no_climb(CHECKPOINTS, "mountPath"),
    _no_climb(CHECKPOINTS, "subPath"),
    _exactly_one(MOUNT, "claimName", "configMapName", "secretName"),
    Rule(
        MOUNT,
        f"!(self.name in {list(names.RESERVED_VOLUMES)})",
        "this volume name is the operator's own: choose another",
        ".name",
    ),
    _no_climb(MOUNT, "mountPath"),
    _no_climb(MOUNT, "subPath"),
    _excludes(CACHE, "claimName", "sizeLimit"),
    _counted(CACHE, "sizeLimit"),
    _no_climb(CACHE, "mountPath"),
    Rule(
        "spec.storage",
        f"!has(self.mounts) || self.mounts.all(a, !(a.mountPath in {_OWN_PATHS}) && "
        "self.mounts.exists_one(b, b.mountPath == a.mountPath))",
        "this mountPath is used twice, or by the operator (/tmp, /dev/shm): give each volume its "
        "own",
        ".mounts",
    ),
    Rule(
        "spec.storage",
        "self.checkpoints.mountPath != self.cache.mountPath && "
        + " && ".join(
            f"self.{each}.mountPath != '{path}'"
            for each in ("checkpoints", "cache")
            for path in names.RESERVED_PATHS
        ),
        "checkpoints and cache need a mountPath each, not /tmp or /dev/shm: change one",
        ".checkpoints.mountPath",
    ),
    Rule(
        "spec.sharedMemory",
        "self.enabled || !has(self.sizeLimit)",
        "sizeLimit has no effect with enabled: false: remove one of them",
        ".sizeLimit",
    ),
    _counted("spec.sharedMemory", "sizeLimit"),
    _whole_gpus("limits"),
    _whole_gpus("requests"),
    Rule(
        "spec.env[]",
        f"!({_RESERVED_VARIABLE})",
        "this variable is set by torchrun and the operators: remove it",
        ".name",
    ),
    _excludes("spec.env[]", "value", "valueFrom"),
    _exactly_one("spec.env[].valueFrom", "secretKeyRef", "configMapKeyRef", "fieldRef"),
    _exactly_one("spec.envFrom[]", "secretRef", "configMapRef"),
]

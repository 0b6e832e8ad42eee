"""Every name the operator gives or reserves: kinds, labels, children, environment, limits.

Called by the pure modules, the shell and the command line, so that a name is spelt once. Imports
nothing and must never compute anything but names.
"""

from __future__ import annotations

GROUP = "osft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "OSFTJob"
PLURAL = "osftjobs"
SINGULAR = "osftjob"
SHORT_NAME = "osft"
CATEGORY = "kubeflow"

PYTORCH_JOB_API_VERSION = "kubeflow.org/v1"
PYTORCH_JOB_KIND = "PyTorchJob"

REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
"""On a pod: `master` or `worker`. Every training-operator sets it, and the index."""
REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"
"""On a pod: its number within its type, from 0."""
TRAINING_OPERATOR = "kubeflow.org/training-operator"
"""The manager of a PyTorchJob whose pods are made in this cluster."""

JOB_LABEL = f"{GROUP}/job"
"""Name of the OSFTJob, on everything that is made for it."""
ATTEMPT_LABEL = f"{GROUP}/attempt"
"""Which attempt a PyTorchJob and its pods are."""
RESERVED_LABEL_PREFIXES = (f"{GROUP}/", "training.kubeflow.org/")
"""Labels that belong to the operators; users cannot set them on pods."""
RESERVED_LABELS = (
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
)
"""Labels by which network policies and people choose training pods."""

KUEUE_LABEL_PREFIX = "kueue.x-k8s.io/"
QUEUE_LABEL = KUEUE_LABEL_PREFIX + "queue-name"
WORKLOAD_JOB_LABEL = KUEUE_LABEL_PREFIX + "job-uid"
"""On a Workload: uid of the PyTorchJob it stands for."""
WORKLOAD_PRIORITY_LABEL = KUEUE_LABEL_PREFIX + "priority-class"
KUEUE_JOB_LABELS = (
    QUEUE_LABEL,
    WORKLOAD_PRIORITY_LABEL,
    KUEUE_LABEL_PREFIX + "managed",
    KUEUE_LABEL_PREFIX + "pod-group-name",
)
"""Labels of the whole job; on a pod, Kueue would queue that pod by itself."""

MAX_NAME_LENGTH = 46
"""Leaves room for `-a9999-worker-999` in the 63 characters of a pod's host name."""
MAX_ATTEMPT = 9999
NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""DNS-1035: the name becomes part of host names."""
MAX_NODES = 1000

CONTAINER = "pytorch"
"""The trainer's container; the training-operator looks for this name."""
RENDEZVOUS_PORT_NAME = "pytorchjob-port"
METRICS_PORT_NAME = "metrics"
RESERVED_PORTS = (RENDEZVOUS_PORT_NAME, METRICS_PORT_NAME)
"""Ports of the trainer's container, by name: where the ranks meet, and where progress is served."""

CHECKPOINT_VOLUME = "checkpoints"
CACHE_VOLUME = "cache"
TEMPORARY_VOLUME = "tmp"
SHARED_MEMORY_VOLUME = "shm"
RESERVED_VOLUMES = (CHECKPOINT_VOLUME, CACHE_VOLUME, TEMPORARY_VOLUME, SHARED_MEMORY_VOLUME)
"""Volumes that the operator adds to each pod."""
TEMPORARY_PATH = "/tmp"
SHARED_MEMORY_PATH = "/dev/shm"
RESERVED_PATHS = (TEMPORARY_PATH, SHARED_MEMORY_PATH)
"""Where the operator mounts volumes of its own."""
TERMINATION_PATH = "/dev/termination-log"

RESERVED_ENVIRONMENT_PREFIXES = ("PET_", "OSFT_", "TORCHELASTIC_", "TORCH_ELASTIC_", "ROLE_")
RESERVED_ENVIRONMENT = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONUNBUFFERED",
)
"""Variables by which processes find each other; the rendezvous breaks when users set them."""


def attempt_name(name: str, attempt: int) -> str:
    """Name of the PyTorchJob of an attempt: the OSFTJob's own for the first, then `<name>-a<n>`."""
    assert attempt >= 1, attempt
    return name if attempt == 1 else f"{name}-a{attempt}"


def claim_name(name: str) -> str:
    """Name of the PersistentVolumeClaim for checkpoints that is made for an OSFTJob."""
    return f"{name}-checkpoints"


def is_reserved_variable(name: str) -> bool:
    """Whether an environment variable is the operator's or torchrun's business."""
    return name in RESERVED_ENVIRONMENT or name.startswith(RESERVED_ENVIRONMENT_PREFIXES)

"""What helps against the words of kubelets, container runtimes and registries about a pod.

Called by failure for how containers ended, and by waiting for why they do not start. A cure names
the field that whoever made the job can change, and is only given where the words leave no doubt:
advice about the trainer's image misleads when another container's is meant. Pure.
"""

from __future__ import annotations

import re

from osft_operator.names import CACHE_VOLUME, CONTAINER, SHARED_MEMORY_VOLUME, TEMPORARY_VOLUME

MASTER_WAIT = "init-pytorch"
"""The training-operator's init container of a worker: it waits for the master's name."""
NO_MASTER_WAIT = (
    "the operator's administrator can set trainer.pytorchJobShape: worker-only (a value of its "
    f"chart), with which there is no {MASTER_WAIT}; it counts for OSFTJobs that are made from then "
    "on"
)

_IMAGE_CURES = (
    (r"no space left on device", "the node's disk is full: its administrator must see to it"),
    (
        r"(?i)toomanyrequests|too many requests|rate limit",
        "the registry limits how often it is asked: set spec.imagePullSecrets, or use a mirror",
    ),
    (
        r"(?i)no match for platform|exec format error",
        "the image is not made for the node's processor: use another one, or another node",
    ),
    (
        r"(?i)x509|dial tcp|no such host|connection refused|i/o timeout|TLS handshake",
        "the node does not reach the registry, or does not trust it: see its network, proxy and "
        "certificates",
    ),
    (
        r"(?i)unauthorized|authentication required|access denied|denied:|forbidden",
        "check {image} and spec.imagePullSecrets",
    ),
    (r"(?i)manifest unknown|not found|does not exist", "check {image}"),
)
_EMPTY_DIRS = {
    CACHE_VOLUME: "raise spec.storage.cache.sizeLimit",
    SHARED_MEMORY_VOLUME: "raise spec.sharedMemory.sizeLimit",
    TEMPORARY_VOLUME: "write less to /tmp",
}


def image(container: str, words: str) -> str:
    """What helps where an image cannot be pulled."""
    if container == MASTER_WAIT:
        return (
            "the training-operator's administrator sets this image "
            f"(--pytorch-init-container-image); or {NO_MASTER_WAIT}"
        )
    field = "spec.image" if container == CONTAINER else "its image in spec.podTemplate"
    found = next((cure for pattern, cure in _IMAGE_CURES if re.search(pattern, words)), None)
    return (found or "check {image} and spec.imagePullSecrets").format(image=field)


def memory(container: str) -> str:
    """What helps after the kernel has ended a container for its memory limit."""
    if container == MASTER_WAIT:
        return f"this container used more memory than its limit; {NO_MASTER_WAIT}"
    if container != CONTAINER:
        return (
            "this container, not the trainer, used more memory than its limit: raise it in "
            "spec.podTemplate"
        )
    return (
        "the container used more memory than its limit (/dev/shm counts, and so does the copy that "
        "each save takes); raise spec.resources.limits.memory, or, where it trains on CPUs, lower "
        "spec.training.maxTokensPerGpu"
    )


def eviction(words: str) -> str:
    """What helps after a node has put a pod out; empty where nobody but its administrator can."""
    if match := re.search(r'EmptyDir volume "([^"]+)" exceeds', words):
        return _EMPTY_DIRS.get(match[1], "raise its sizeLimit in spec.podTemplate")
    if re.search(r"ephemeral.(?:local.)?storage", words):
        return (
            "ask for as much as the pod writes (ephemeral-storage in spec.resources), or keep what "
            "it downloads on a claim (spec.storage.cache.claimName)"
        )
    if "low on resource: memory" in words:
        return "ask for as much memory as the pod uses: spec.resources.requests.memory"
    return ""


def volume(words: str) -> str:
    """What helps where a volume cannot be attached; empty if unknown."""
    if "Multi-Attach error" in words:
        return (
            "a pod on another node still has it: wait until that is gone, or use a claim that is "
            "ReadWriteMany"
        )
    return ""

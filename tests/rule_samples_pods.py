"""A good and a bad change for each rule about an OSFTJob's volumes, variables and pods."""

from __future__ import annotations

from typing import Any

from job_samples import GONE, Object, Sample

S, C = "spec.storage", "spec.storage.checkpoints"


def _mount(**changes: Any) -> list[Object]:
    mount = {"name": "data", "claimName": "data", "mountPath": "/data", **changes}
    return [{key: value for key, value in mount.items() if value is not GONE}]


PODS = [
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
        "claim-counted",
        {f"{C}.size": "7Ei"},
        {f"{C}.size": "1e19"},
        f"{C}",
        words="is beyond what Kubernetes can count: write a number below 8E",
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
        "cache-counted",
        {f"{S}.cache": {"sizeLimit": "1e12"}},
        {f"{S}.cache": {"sizeLimit": "1e99999999999"}},
        f"{S}.cache",
        words="is beyond what Kubernetes can count",
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
    Sample(
        "shared-memory-counted",
        {"spec.sharedMemory": {"sizeLimit": "0.5Gi"}},
        {"spec.sharedMemory": {"sizeLimit": "8Ei"}},
        "spec.sharedMemory",
        words="is beyond what Kubernetes can count",
    ),
    Sample(
        "limits-whole",
        {"spec.resources.limits": {"nvidia.com/gpu": "8.0", "rdma/hca": "1k", "a/b": "2000m"}},
        {"spec.resources.limits": {"nvidia.com/gpu": "0.5"}},
        "spec.resources",
        words="is counted in whole numbers",
    ),
    Sample(
        "requests-whole",
        {"spec.resources.requests": {"example.com/a": 1, "cpu": "0.5"}},
        {"spec.resources.requests": {"amd.com/gpu": "1.50"}},
        "spec.resources",
        words="is counted in whole numbers",
    ),
]

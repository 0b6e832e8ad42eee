"""What the watches, the lists and our own writes have said, in plain dicts.

Watches (handlers), lists (resync) and answers to writes (reconcile) put objects in; reconcile and
polling read. Every object belongs to one OSFTJob: itself, or the one its label names. Of an object
that is too deep or too large so much is kept as shows that it is. Used from the main event loop
only; must never call the cluster, and what it returns must not be changed.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import Any

from osft_operator import run_folder
from osft_operator.bounds import CUT_LEVELS, Excess, too_long_template
from osft_operator.isolation import set_aside
from osft_operator.kinds import (
    CLAIMS,
    OSFTJOBS,
    PODS,
    PYTORCHJOBS,
    Kind,
    Object,
)
from osft_operator.names import JOB_LABEL
from osft_operator.queue import Key
from osft_operator.run_folder import RunFolder

WATCHED = (OSFTJOBS, PYTORCHJOBS, PODS, CLAIMS)
"""The kinds that are watched and listed."""
REMEMBERED_UIDS = 20000
"""Deleted objects that are remembered, so that a late answer does not bring them back."""
TAKEN = "DisruptionTarget"
"""The condition of a pod that the cluster takes away."""
REMEMBERED_FAILURES = 1000
"""Pods that failed and were deleted, of all jobs, whose last state is kept."""
REPLICA_SPECS = "pytorchReplicaSpecs"
"""Here only the numbers are read, never the pods' templates."""
RUN_FOLDER = "runFolder"
"""Claim and path that a training pod writes to, in the place of the fields that say so."""
SPEC_FIELDS = {
    PODS: ("nodeName", "hostNetwork", RUN_FOLDER),
    PYTORCHJOBS: ("runPolicy", REPLICA_SPECS),
}
"""All that is kept of these specs: they are by far the largest part, and nothing reads the rest."""
UNREAD_METADATA = ("managedFields", "annotations")
NEEDED_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "labels",
    "ownerReferences",
)
"""What is kept of an object that cannot be read."""
SHARED_CHARACTERS = 64
"""Longest text that is worth a look whether another object has it, too."""


def selector(kind: Kind) -> str:
    """Label selector, for the server, of the objects of a kind that concern us."""
    return "" if kind is OSFTJOBS else JOB_LABEL


class Cache:
    """Objects by kind and name, and by the OSFTJob they belong to."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[tuple[str, str], Object]] = {kind: {} for kind in WATCHED}
        self._children: dict[Kind, dict[Key, set[str]]] = {kind: {} for kind in WATCHED}
        self._writers: dict[tuple[str, RunFolder], set[str]] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._failed: OrderedDict[str, tuple[Key, Object]] = OrderedDict()

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """One object, or None."""
        return self._objects[kind].get((namespace, name))

    def all(self, kind: Kind) -> Iterable[Object]:
        """Every object of a kind."""
        return self._objects[kind].values()

    def children(self, kind: Kind, key: Key) -> list[Object]:
        """Objects of a kind whose label names this OSFTJob, by name. Owners are not compared."""
        names = sorted(self._children[kind].get(key, ()))
        return [self._objects[kind][key.namespace, name] for name in names]

    def failed_and_gone(self, key: Key) -> list[Object]:
        """The last state of an OSFTJob's pods that failed and are gone, as far as remembered.

        A controller deletes a failed pod within milliseconds: no pass may come in between.
        """
        return [body for owner, body in self._failed.values() if owner == key]

    def jobs(self) -> list[Key]:
        """Every OSFTJob."""
        return [Key(*name) for name in self._objects[OSFTJOBS]]

    def put(self, kind: Kind, body: Object) -> Key | None:
        """Remember an object, unless it is older than what is known.

        Returns:
            The OSFTJob that this is news for; None when it is no news.
        """
        metadata = body["metadata"]
        name = (metadata["namespace"], metadata["name"])
        known = self._objects[kind].get(name)
        if metadata["uid"] in self._gone or (known and not _newer(body, known)):
            return None
        kept = trimmed(kind, body)
        if known and _belongs(kind, known) != _belongs(kind, kept):
            self._unlink(kind, known)
        if known and known["metadata"]["uid"] != metadata["uid"]:
            self._bury(kind, known)
        self._objects[kind][name] = kept
        if (folder := _folder_of(kind, kept)) is not None:
            self._writers.setdefault((metadata["namespace"], folder), set()).add(metadata["name"])
        key = job_of(kind, body)
        if key is not None:
            self._children[kind].setdefault(key, set()).add(metadata["name"])
        return key

    def remove(self, kind: Kind, body: Object) -> Key | None:
        """Forget an object that was deleted.

        Returns:
            The OSFTJob that this is news for; None when it is no news.
        """
        metadata = body["metadata"]
        self._gone[metadata["uid"]] = None
        if len(self._gone) > REMEMBERED_UIDS:
            self._gone.popitem(last=False)
        known = self._objects[kind].get((metadata["namespace"], metadata["name"]))
        if known is None or known["metadata"]["uid"] != metadata["uid"]:
            return None
        self._unlink(kind, known)
        self._bury(kind, trimmed(kind, body) if _newer(body, known) else known)
        del self._objects[kind][metadata["namespace"], metadata["name"]]
        return job_of(kind, known)

    def sweep(self, kind: Kind, namespace: str | None, present: Set[str], version: str) -> set[Key]:
        """Forget ghosts: what a whole list did not hold, and what is not newer than it.

        Args:
            kind: what was listed.
            namespace: where; None for everywhere.
            present: uids of all that the list held; `put` has had them.
            version: resourceVersion of the list.

        Returns:
            The OSFTJobs that this is news for.
        """
        changed = set()
        for body in list(self.all(kind)):
            metadata = body["metadata"]
            elsewhere = namespace is not None and metadata["namespace"] != namespace
            if elsewhere or metadata["uid"] in present:
                continue
            if _number(metadata["resourceVersion"]) <= _number(version):
                changed.add(self.remove(kind, body))
        return {key for key in changed if key is not None}

    def writers(self, namespace: str, folder: RunFolder) -> list[Object]:
        """The training pods, of whatever OSFTJob, that write to a folder; by name."""
        found = sorted(self._writers.get((namespace, folder), ()))
        return [self._objects[PODS][namespace, name] for name in found]

    def _bury(self, kind: Kind, body: Object) -> None:
        key = job_of(kind, body)
        if kind is OSFTJOBS and key is not None:
            self._failed = OrderedDict(
                (uid, each) for uid, each in self._failed.items() if each[0] != key
            )
        status = body.get("status") or {}
        taken = any(each.get("type") == TAKEN for each in status.get("conditions") or ())
        if kind is PODS and key is not None and (taken or status.get("phase") == "Failed"):
            self._failed[body["metadata"]["uid"]] = (key, body)
            if len(self._failed) > REMEMBERED_FAILURES:
                self._failed.popitem(last=False)

    def _unlink(self, kind: Kind, body: Object) -> None:
        if (folder := _folder_of(kind, body)) is not None:
            place = (body["metadata"]["namespace"], folder)
            self._writers[place].discard(body["metadata"]["name"])
            if not self._writers[place]:
                del self._writers[place]
        key = job_of(kind, body)
        if key is None:
            return
        names = self._children[kind][key]
        names.discard(body["metadata"]["name"])
        if not names:
            del self._children[kind][key]


def _belongs(kind: Kind, kept: Object) -> tuple[Key | None, RunFolder | None]:
    return job_of(kind, kept), _folder_of(kind, kept)


def _folder_of(kind: Kind, kept: Object) -> RunFolder | None:
    found = kept.get("spec", {}).get(RUN_FOLDER) if kind is PODS else None
    return RunFolder(*found) if found else None


def job_of(kind: Kind, body: Object) -> Key | None:
    """The OSFTJob that an object belongs to; None when its label names none."""
    metadata = body["metadata"]
    if kind is OSFTJOBS:
        return Key(metadata["namespace"], metadata["name"])
    job = (metadata.get("labels") or {}).get(JOB_LABEL)
    return Key(metadata["namespace"], job) if job else None


def _newer(body: Object, known: Object) -> bool:
    """Whether to take `body` over `known` of the same name."""
    # Also with another uid: of two objects of one name, the one written later is there.
    new, old = body["metadata"], known["metadata"]
    return _number(new["resourceVersion"]) > _number(old["resourceVersion"])


def _number(version: str) -> int:
    """A resourceVersion to compare; they are numbers that grow within a kind."""
    return int(version) if version.isdecimal() else 0


def trimmed(kind: Kind, body: Object) -> Object:
    """What is kept of an object: nothing that nobody reads, and no text twice."""
    metadata = body["metadata"]
    with set_aside("watch", f"{kind.kind} {metadata.get('namespace')}/{metadata.get('name')}"):
        return _trimmed(kind, body)
    # so much is needed to know that it is there
    kept = {name: metadata[name] for name in NEEDED_METADATA if name in metadata}
    unread = Excess("spec: the operator cannot read this object; see its log")
    spec = {"podTemplate": unread} if kind is OSFTJOBS else {}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": kept, "spec": spec}


def _trimmed(kind: Kind, body: Object) -> Object:
    metadata = {k: v for k, v in body["metadata"].items() if k not in UNREAD_METADATA}
    kept: dict[str, Any] = {**body, "metadata": metadata}
    if kind in SPEC_FIELDS:
        spec = body.get("spec") or {}
        kept["spec"] = {name: spec[name] for name in SPEC_FIELDS[kind] if name in spec}
        if kind is PODS and (folder := run_folder.of_pod(body)) is not None:
            kept["spec"][RUN_FOLDER] = list(folder)
        if REPLICA_SPECS in kept["spec"]:
            kept["spec"][REPLICA_SPECS] = {
                each: {"replicas": replica.get("replicas", 1)}
                for each, replica in spec[REPLICA_SPECS].items()
            }
    shared: Object = _shared(kept, CUT_LEVELS)
    if kind is OSFTJOBS and (large := too_long_template(shared)) is not None:
        shared["spec"]["podTemplate"] = large
    return shared


def _shared(value: Any, levels: int) -> Any:
    """The same value, at most so deep, of strings that all objects share where they are short."""
    if isinstance(value, str):
        return _short(value)
    if isinstance(value, dict) and levels > 0:
        return {_short(name): _shared(each, levels - 1) for name, each in value.items()}
    if isinstance(value, list) and levels > 0:
        return [_shared(each, levels - 1) for each in value]
    return {} if isinstance(value, dict | list) else value


def _short(text: str) -> str:
    return sys.intern(text) if len(text) <= SHARED_CHARACTERS else text

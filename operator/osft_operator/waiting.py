"""Says in words why the pods of an attempt do not all run.

Called by gang. Pure. What stands in a pod's status is said first, then what the scheduler and the
claim say, then the newest event about a pod, which is all there is for a volume that cannot be
mounted. A pod that is only young has no reason.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from osft_operator import cures
from osft_operator.cures import MASTER_WAIT
from osft_operator.failure import clean, is_lost, word
from osft_operator.names import CONTAINER
from osft_operator.observed import Object, Said, find_condition, is_deleting, time_of
from osft_trainer.report import duration

Reason = tuple[str, str]
"""One word for a condition, and a sentence for people."""


class Trouble(NamedTuple):
    """Why the pods do not start, and which object is waited for."""

    reason: str
    words: str
    kind: str
    name: str
    since: str | None
    """Since when, where the object tells."""


PROBLEMS = (
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
"""Reasons of a waiting container that time alone rarely cures."""
FOR_ITS_AUTHOR = frozenset({*PROBLEMS, "InitContainerFailing", "FailedMount"})
"""Reasons that whoever made the job must see to: the pod has its place, and cannot use it."""
PULLING = ("ImagePullBackOff", "ErrImagePull")
"""Reasons of a container whose image does not come."""
CURES = {
    "InvalidImageName": "correct spec.image",
    "ErrImageNeverPull": "the node has no such image: change spec.imagePullPolicy",
}
"""What helps where it is the trainer's container."""
INIT_STUCK_SECONDS = 300.0
"""An init container that runs for so long is worth a word; it may still be right."""
STARTING = "PodsStarting"
"""The reason of pods with which nothing is wrong."""
_MISSING = re.compile(r'(?i)\b(secret|configmap|persistentvolumeclaim) "([^"]+)" not found')
_NO_KEY = re.compile(r"(?i)couldn't find key (\S+) in (secret|configmap) [^/\s]+/([^\s,;]+)")
NAMING = ("name", "secretName", "configMapName", "claimName")
"""Fields that name an object."""
_VOLUME_WORDS = ("PersistentVolumeClaim", "persistentvolumeclaim", "persistent volume")


def reason(
    pods: Sequence[Object],
    spec: Mapping[str, Any],
    claim: Object | None,
    news: Mapping[str, Said],
    now: datetime.datetime,
) -> Trouble | None:
    """Why the pods do not start; None when nothing is known to be wrong.

    Args:
        pods: those of the attempt.
        spec: the OSFTJob's, to name the field that names what is missing.
        claim: for checkpoints, if it was looked at.
        news: the newest event by uid, of a pod or of the claim, where one was looked for.
        now: the time.
    """
    pending = [pod for pod in pods if not is_deleting(pod) and _phase(pod) in ("Pending", "")]
    unknown = list(filter(is_lost, pods))

    def event(pod: Object) -> Said | None:
        return news.get(pod["metadata"].get("uid", ""))

    # a worker's wait for its master comes last: what keeps the master explains it
    looks: tuple[Callable[[Object], Reason | None], ...] = (
        lambda pod: _of_containers(pod, spec, event(pod)),
        lambda pod: _of_scheduler(pod, spec, claim, news),
        lambda pod: _of_event(pod, event(pod), spec, warns=True),
        lambda pod: _of_slow_init(pod, now),
        lambda pod: _of_event(pod, event(pod), spec, warns=False),
    )
    for look in looks:
        for pod in pending:
            if (found := look(pod)) is not None:
                return _trouble(pod, claim, *found)
    if unknown:
        pod = unknown[0]
        return Trouble(
            "NodeLost", lost_words(pod), "Pod", pod["metadata"]["name"], _silent_since(pod)
        )
    return None


def _trouble(pod: Object, claim: Object | None, reason: str, words: str) -> Trouble:
    if reason == "ClaimPending" and claim is not None:
        metadata = claim["metadata"]
        made = metadata.get("creationTimestamp")
        return Trouble(reason, words, "PersistentVolumeClaim", metadata["name"], made)
    metadata = pod["metadata"]
    return Trouble(reason, words, "Pod", metadata["name"], metadata.get("creationTimestamp"))


def lost_words(pod: Object) -> str:
    """What can be said and done about a pod whose node does not answer."""
    metadata = pod["metadata"]
    name, space = metadata["name"], metadata.get("namespace", "NAMESPACE")
    node = (pod.get("spec") or {}).get("nodeName")
    since = _silent_since(pod) or metadata.get("deletionTimestamp")
    return (
        f"pod {name}: its node{f' {node}' if node else ''} does not answer"
        f"{f' since {since}' if since else ''}, so nobody can say whether the pod still runs. Once "
        f"the node is certainly off: kubectl delete pod {name} -n {space} --force --grace-period=0"
        f", or for all of its pods: kubectl taint nodes {node or 'NODE'} "
        "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    )


def _silent_since(pod: Object) -> str | None:
    when = find_condition(pod.get("status") or {}, "Ready").get("lastTransitionTime")
    return str(when) if when and is_lost(pod) else None


def _of_containers(pod: Object, spec: Mapping[str, Any], event: Said | None) -> Reason | None:
    for container in _containers(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        said, name = str(waiting.get("reason") or ""), str(container.get("name"))
        if said not in PROBLEMS:
            continue
        text, more = clean(waiting.get("message")), ""
        if event is not None and event.is_warning and said in PULLING:
            # a kubelet that waits says only that it does; why the pull failed is in the event
            more = "" if event.message in text else clean(event.message)
        cure = missing(text, spec)
        if not cure and said in PULLING:
            cure = cures.image(name, f"{text} {more}")
        elif not cure and name == CONTAINER:
            cure = CURES.get(said, "")
        where = f"container {name} of pod {pod['metadata']['name']}: "
        return said, where + "; ".join(filter(None, (text, more, cure)))
    for container in (pod.get("status") or {}).get("initContainerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") != "CrashLoopBackOff" or container.get("name") == MASTER_WAIT:
            continue
        ended = (container.get("lastState") or {}).get("terminated") or {}
        return "InitContainerFailing", (
            f"init container {container.get('name')} of pod {pod['metadata']['name']} ends with "
            f"exit code {ended.get('exitCode')} again and again: {clean(ended.get('message'))}"
        ).rstrip(": ")
    return None


def _of_scheduler(
    pod: Object, spec: Mapping[str, Any], claim: Object | None, news: Mapping[str, Said]
) -> Reason | None:
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") != "PodScheduled" or condition.get("status") != "False":
            continue
        text = clean(condition.get("message"))
        pending = ((claim or {}).get("status") or {}).get("phase") == "Pending"
        if claim is not None and pending and any(each in text for each in _VOLUME_WORDS):
            told = clean(news.get(claim["metadata"].get("uid", "")))
            own = f"claim {claim['metadata']['name']} is Pending" + (f": {told}" if told else "")
            return "ClaimPending", f"{own}; pod {pod['metadata']['name']}: {text}"
        cure = missing(text, spec)
        return word(condition.get("reason"), "Unschedulable"), (
            f"pod {pod['metadata']['name']}: {text}" + (f"; {cure}" if cure else "")
        )
    return None


def _of_slow_init(pod: Object, now: datetime.datetime) -> Reason | None:
    for container in (pod.get("status") or {}).get("initContainerStatuses") or []:
        state = container.get("state") or {}
        began = (state.get("running") or {}).get("startedAt")
        seconds = (now - time_of(began)).total_seconds() if began else 0.0
        again = (state.get("waiting") or {}).get("reason") == "CrashLoopBackOff"
        if seconds < INIT_STUCK_SECONDS and not again:
            continue
        words = f"init container {container.get('name')} of pod {pod['metadata']['name']} "
        words += "gives up again and again" if again else f"has run for {duration(int(seconds))}"
        if container.get("name") == MASTER_WAIT:
            words += ": it waits for the master's name in DNS; does the master's pod run?"
        return "InitStuck", words
    return None


def _of_event(
    pod: Object, event: Said | None, spec: Mapping[str, Any], *, warns: bool
) -> Reason | None:
    text = clean(event.message) if event is not None else ""
    if event is None or not text or event.is_warning != warns:
        return None
    cure = missing(text, spec) or cures.volume(text)
    words = f"pod {pod['metadata']['name']}: {text}" + (f"; {cure}" if cure else "")
    # what is said of a pod on its good way is no reason of its own
    return word(event.reason, STARTING) if event.is_warning else STARTING, words


def missing(text: str, spec: Mapping[str, Any]) -> str:
    """What a Secret, ConfigMap or claim lacks, and what field names it; empty if it is another."""
    if match := _NO_KEY.search(text):
        kind, name, what = match[2], match[3], f"add key {match[1]} to"
    elif match := _MISSING.search(text):
        kind, name, what = match[1], match[2], "make"
    else:
        return ""
    kinds = {"secret": "Secret", "configmap": "ConfigMap"}
    kind = kinds.get(kind.lower(), "PersistentVolumeClaim")
    places = [path for path, value in _texts(spec, "spec") if value == name]
    named = f" (named by {places[0]})" if places else ""
    return f"{what} {kind} {name} in the job's namespace{named}"


def _texts(part: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text of a spec that names an object, with the path of the field it stands in."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            if isinstance(value, str) and key in NAMING:
                yield (path if key == "name" else f"{path}.{key}"), value
            elif not isinstance(value, str):
                yield from _texts(value, f"{path}.{key}")
    elif isinstance(part, list | tuple):
        for index, value in enumerate(part):
            yield from _texts(value, f"{path}[{index}]")


def _containers(pod: Object) -> list[Any]:
    status = pod.get("status") or {}
    kinds = ("initContainerStatuses", "containerStatuses")
    return [each for kind in kinds for each in status.get(kind) or []]


def _phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase") or "")

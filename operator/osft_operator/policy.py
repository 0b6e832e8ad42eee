"""What an OSFTJob may not ask for, although its form is right.

Called by decide before anything is made, and by `osft validate`. Pure. The author of an OSFTJob
needs only the right to create OSFTJobs, while pods are made with the operators' rights; so nothing
may pass here that Pod Security `restricted` would refuse and the administrator did not allow, and
nothing that breaks the rendezvous. The namespace's Pod Security admission stays the second line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from osft_operator import names, policy_code, policy_pod, policy_resources
from osft_operator.policy_allowed import Allowed, matches, words
from osft_operator.policy_security import Denial, Rule
from osft_operator.spec import OSFTJob

__all__ = ["Allowed", "Denial", "Rule", "denials"]

Object = dict[str, Any]


def denials(job: OSFTJob, allowed: Allowed | None = None) -> list[Denial]:
    """Everything that is refused; empty if nothing is.

    Args:
        job: the OSFTJob.
        allowed: what the administrator allows; None: what a fresh installation does.
    """
    allowed = allowed or Allowed()
    template = job.spec.pod_template
    if wrong := list(policy_pod.shapes(template.spec, policy_pod.WHERE)):
        return wrong
    return [
        *_environment(job),
        *_queue(job),
        *_classes(job, allowed),
        *(() if allowed.allow_remote_code else policy_code.denials(job)),
        *_metadata(template.metadata),
        *policy_pod.denials(job, allowed),
        *policy_resources.denials(job),
    ]


def _environment(job: OSFTJob) -> Iterator[Denial]:
    own = {
        "HF_TOKEN": job.spec.secrets.hf_token and "secrets.hfToken",
        "WANDB_API_KEY": job.spec.secrets.wandb_api_key and "secrets.wandbApiKey",
    }
    seen: set[str] = set()
    for index, variable in enumerate(job.spec.env):
        where = f"spec.env[{index}].name"
        if variable.name in seen:
            text = f"{variable.name} is given twice: keep one"
            yield Denial(Rule.REPEATED_VARIABLE, where, text)
        if own.get(variable.name):
            text = f"{variable.name} is set by spec.{own[variable.name]}: keep one of them"
            yield Denial(Rule.REPEATED_VARIABLE, where, text)
        seen.add(variable.name)
    for index, source in enumerate(job.spec.env_from):
        # The keys are in an object that the operator does not read; their prefix is not.
        prefix = source.prefix or ""
        if names.is_reserved_variable(prefix):
            text = f"{prefix} begins variables of torchrun and the operators: choose another"
            yield Denial(Rule.RESERVED_VARIABLE, f"spec.envFrom[{index}].prefix", text)


def _queue(job: OSFTJob) -> Iterator[Denial]:
    pairs = (
        ("queueName", job.spec.queue_name, names.QUEUE_LABEL),
        (
            "workloadPriorityClassName",
            job.spec.workload_priority_class_name,
            names.WORKLOAD_PRIORITY_LABEL,
        ),
    )
    for field, value, label in pairs:
        given = job.metadata.labels.get(label)
        if value is not None and given is not None and given != value:
            text = f"is {value}, but label {label} is {given}: keep one"
            yield Denial(Rule.TWO_QUEUES, f"spec.{field}", text)


def _classes(job: OSFTJob, allowed: Allowed) -> Iterator[Denial]:
    label = names.WORKLOAD_PRIORITY_LABEL
    given = {
        "spec.priorityClassName": job.spec.priority_class_name,
        "spec.workloadPriorityClassName": job.spec.workload_priority_class_name,
        f"metadata.labels[{label}]": job.metadata.labels.get(label),
    }
    for where, name in given.items():
        if name is not None and not matches(name, allowed.allowed_priority_classes):
            listed = words(allowed.allowed_priority_classes)
            text = f"{name} is not allowed here; allowed are: {listed}"
            yield Denial(Rule.PRIORITY_CLASS, where, text)


def _metadata(metadata: Object) -> Iterator[Denial]:
    for key in metadata:
        if key not in ("labels", "annotations"):
            where = f"spec.podTemplate.metadata.{key}"
            text = "only labels and annotations can be given: remove it"
            yield Denial(Rule.UNKNOWN_FIELD, where, text)
    for kind in ("labels", "annotations"):
        entries = metadata.get(kind, {})
        where = f"spec.podTemplate.metadata.{kind}"
        if not isinstance(entries, dict):
            yield Denial(Rule.WRONG_TYPE, where, "must be a map of texts")
            continue
        for name, value in entries.items():
            yield from _entry(f"{where}[{name}]", name, value)


def _entry(where: str, name: str, value: Any) -> Iterator[Denial]:
    """One label or annotation of the pods."""
    if not isinstance(value, str):
        yield Denial(Rule.WRONG_TYPE, where, "must be a text: put it in quotes")
    elif name.startswith(names.RESERVED_LABEL_PREFIXES) or name in names.RESERVED_LABELS:
        yield Denial(Rule.RESERVED_LABEL, where, "belongs to the operators: remove it")
    elif name in names.KUEUE_JOB_LABELS:
        text = "would queue each pod by itself: use spec.queueName, or the OSFTJob's own labels"
        yield Denial(Rule.RESERVED_LABEL, where, text)
    elif "apparmor.security.beta" in name or "seccomp.security.alpha" in name:
        yield Denial(Rule.ISOLATION, where, "weakens the pod: remove it")

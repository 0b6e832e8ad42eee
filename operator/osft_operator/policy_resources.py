"""What no pod can have: amounts that Kubernetes refuses, in spec.resources and in podTemplate.

Called by policy. Pure. The API server checks the amounts of a pod when the pod is made, by another
controller and after the PyTorchJob; here its author is told before. Some amounts would also break
whoever reads them, for all jobs: a controller cannot decode `1e99999999999`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from osft_operator import resources
from osft_operator.policy_security import Denial, Rule
from osft_operator.spec import OSFTJob

Object = dict[str, Any]

WHERE = "spec.podTemplate.spec"
STANDARD = ("cpu", "memory", "ephemeral-storage")
"""Resources without `/` that a container can have, beside huge pages."""


def denials(job: OSFTJob) -> Iterator[Denial]:
    """Every amount that no pod can have; the shapes of lists are right by now."""
    spec, template = job.spec, job.spec.pod_template.spec
    own = {"limits": spec.resources.limits, "requests": spec.resources.requests}
    yield from _container(own, "spec.resources")
    yield from _processes(job)
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(template.get(kind) or []):
            where = f"{WHERE}.{kind}[{index}]"
            yield from _container(container.get("resources"), f"{where}.resources")
            yield from _divisors(container, where)
    yield from _container(template.get("resources"), f"{WHERE}.resources")
    yield from _list(template.get("overhead"), f"{WHERE}.overhead")
    for index, volume in enumerate(template.get("volumes") or []):
        yield from _volume(volume, f"{WHERE}.volumes[{index}]")


def _container(given: Any, where: str) -> Iterator[Denial]:
    """Limits and requests, each by itself and against each other."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        yield Denial(Rule.WRONG_TYPE, where, "must be an object")
        return
    found = [
        denial
        for kind in ("limits", "requests")
        for denial in (*_list(given.get(kind), f"{where}.{kind}"), *_names(given.get(kind), where))
    ]
    yield from found or _against_limits(given, where)


def _names(given: Any, where: str) -> Iterator[Denial]:
    for name in given if isinstance(given, Mapping) else ():
        if "/" not in name and name not in STANDARD and not name.startswith("hugepages-"):
            text = f"{name} is no resource of a container: write for instance nvidia.com/gpu"
            yield Denial(Rule.RESOURCES, where, text)


def _list(given: Any, where: str) -> Iterator[Denial]:
    """Amounts by resource."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        yield Denial(Rule.WRONG_TYPE, where, "must be a map of quantities")
        return
    for name, amount in given.items():
        here = f"{where}[{name}]"
        if wrong := list(_quantity(amount, here)):
            yield from wrong
        elif resources.is_extended(name) and resources.quantity(str(amount)).denominator != 1:
            yield Denial(Rule.RESOURCES, here, f"is {amount}: {resources.WHOLE_WORDS}")


def _quantity(given: Any, where: str) -> Iterator[Denial]:
    if given is None:
        return
    if not isinstance(given, str | int) or isinstance(given, bool):
        yield Denial(Rule.WRONG_TYPE, where, "must be a quantity: write for instance 500m or 4")
        return
    try:
        resources.quantity(str(given))
    except ValueError as error:
        yield Denial(Rule.RESOURCES, where, str(error))


def _against_limits(given: Mapping[str, Any], where: str) -> Iterator[Denial]:
    limits = given.get("limits") or {}
    for name, amount in (given.get("requests") or {}).items():
        here, limit = f"{where}.requests[{name}]", limits.get(name)
        if amount is None:
            continue
        if limit is None:
            if resources.is_extended(name):
                text = f"a device needs a limit: set {where}.limits[{name}] to {amount}"
                yield Denial(Rule.RESOURCES, here, text)
            continue
        asked, most = resources.quantity(str(amount)), resources.quantity(str(limit))
        if asked > most or (asked != most and resources.is_extended(name)):
            relation = "the same as" if resources.is_extended(name) else "at most"
            text = f"is {amount} and must be {relation} the limit, which is {limit}"
            yield Denial(Rule.RESOURCES, here, text)


def _processes(job: OSFTJob) -> Iterator[Denial]:
    """One process for each GPU: a mistyped number of them would be one of processes."""
    limits = {**job.spec.resources.limits}
    count = resources.gpus(limits)
    if job.spec.nproc_per_node is None and count > resources.MAX_PROCESSES:
        text = (
            f"are {count} GPUs, and at most {resources.MAX_PROCESSES} processes run in a pod: ask "
            "for fewer, or set spec.nprocPerNode"
        )
        yield Denial(Rule.RESOURCES, "spec.resources.limits", text)


def _volume(volume: Object, where: str) -> Iterator[Denial]:
    match volume:
        case {"emptyDir": {"sizeLimit": limit}}:
            yield from _quantity(limit, f"{where}.emptyDir.sizeLimit")
        case {"ephemeral": {"volumeClaimTemplate": {"spec": {"resources": Mapping() as given}}}}:
            here = f"{where}.ephemeral.volumeClaimTemplate.spec.resources"
            for kind in ("limits", "requests"):
                yield from _list(given.get(kind), f"{here}.{kind}")
        case {"downwardAPI": {"items": list(items)}}:
            for index, item in enumerate(items):
                yield from _divisor(item, f"{where}.downwardAPI.items[{index}].resourceFieldRef")


def _divisors(container: Object, where: str) -> Iterator[Denial]:
    for index, variable in enumerate(container.get("env") or []):
        source = variable.get("valueFrom")
        yield from _divisor(source, f"{where}.env[{index}].valueFrom.resourceFieldRef")


def _divisor(part: Any, where: str) -> Iterator[Denial]:
    match part:
        case {"resourceFieldRef": {"divisor": divisor}}:
            yield from _quantity(divisor, f"{where}.divisor")

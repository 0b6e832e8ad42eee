"""What a refusal is, the names of all rules, and what a security context may not say.

Called by policy and policy_pod. The rules for a context are those of Pod Security `restricted`,
and a capability only when the administrator lists it; nothing may be said that weakens what pod
renders.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from osft_operator.policy_allowed import Allowed, matches, words


class Rule(enum.StrEnum):
    """Names of the rules. They are API: each refusal names its own."""

    CAPABILITY = "Capability"
    """A container adds a capability that is not in the list of allowed ones."""
    HAS_OWN_FIELD = "HasOwnField"
    """The OSFTJob has a field for this; podTemplate is not the place."""
    HOST_ACCESS = "HostAccess"
    """Something of the node: its network, processes, memory, ports, or mounts."""
    IMAGE = "Image"
    """An image that is not in the list of allowed ones."""
    ISOLATION = "Isolation"
    """A security context, or an annotation, that Pod Security `restricted` refuses."""
    NODE_SELECTOR = "NodeSelector"
    """A node's label, or name, that is not in the list of allowed ones."""
    OPERATORS_OWN = "OperatorsOwn"
    """A field by which the operators run the pods and the pods find each other."""
    PRIORITY_CLASS = "PriorityClass"
    """A priority class that is not in the list of allowed ones."""
    REMOTE_CODE = "RemoteCode"
    """Code that no image brings, where the administrator forbids it: trustRemoteCode, commands,
    variables that load code, mounts over programs."""
    REPEATED_VARIABLE = "RepeatedVariable"
    """One environment variable, two values."""
    RESERVED_LABEL = "ReservedLabel"
    """A label or annotation of the operators or of Kueue."""
    RESERVED_MOUNT = "ReservedMount"
    """A mount that would redirect one of the trainer's own."""
    RESERVED_NAME = "ReservedName"
    """The name of the trainer's container, or of one of its ports, for something else."""
    RESERVED_VARIABLE = "ReservedVariable"
    """Environment variables of torchrun and the operators."""
    RESERVED_VOLUME = "ReservedVolume"
    """The name of a volume that the OSFTJob or the operator gives already."""
    RESOURCES = "Resources"
    """An amount of a resource that no pod can have: no quantity, beyond what can be counted, a part
    of a device, a request above its limit."""
    SERVICE_ACCOUNT = "ServiceAccount"
    """A service account that is not in the list of allowed ones, or a token of one."""
    TWO_QUEUES = "TwoQueues"
    """A field and a label that name two queues, or two classes."""
    UNKNOWN_FIELD = "UnknownField"
    """A field that does not exist."""
    UNNAMED_PORT = "UnnamedPort"
    """A port without a name."""
    VOLUME_TYPE = "VolumeType"
    """A volume type that Pod Security `restricted` refuses."""
    WRONG_TYPE = "WrongType"
    """A value of the wrong type."""


@dataclass(frozen=True)
class Denial:
    """One thing that is refused."""

    rule: Rule
    """Which rule."""
    field: str
    """Path of the field."""
    message: str
    """What is wrong and what to do."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message} (rule {self.rule})"


SECURITY: dict[str, tuple[tuple[Any, ...], str]] = {
    "privileged": ((False,), "false"),
    "allowPrivilegeEscalation": ((False,), "false"),
    "runAsNonRoot": ((True,), "true"),
    "procMount": (("Default",), "Default"),
}
"""Fields of a security context: what may be said."""
ALWAYS_ALLOWED = "NET_BIND_SERVICE"
"""The one capability that Pod Security `restricted` lets a container add."""


def security(context: Any, where: str, allowed: Allowed) -> Iterator[Denial]:
    """Everything that is refused in a security context."""
    if context is None:
        return
    if not isinstance(context, dict):
        yield Denial(Rule.WRONG_TYPE, where, "must be an object")
        return
    for key, (values, text) in SECURITY.items():
        if key in context and context[key] not in values:
            yield Denial(Rule.ISOLATION, f"{where}.{key}", f"must be {text}: remove it")
    if context.get("runAsUser") == 0:
        yield Denial(Rule.ISOLATION, f"{where}.runAsUser", "must not be 0 (root): remove it")
    for key in ("sysctls", "windowsOptions", "seLinuxOptions"):
        if key in context:
            yield Denial(Rule.ISOLATION, f"{where}.{key}", "is refused: remove it")
    for key in ("seccompProfile", "appArmorProfile"):
        profile = context.get(key)
        if profile is not None and (
            not isinstance(profile, dict) or profile.get("type") == "Unconfined"
        ):
            text = "must not be Unconfined: remove it"
            yield Denial(Rule.ISOLATION, f"{where}.{key}", text)
    yield from _capabilities(context.get("capabilities"), f"{where}.capabilities", allowed)


def _capabilities(given: Any, where: str, allowed: Allowed) -> Iterator[Denial]:
    if given is None:
        return
    if not isinstance(given, dict):
        yield Denial(Rule.WRONG_TYPE, where, "must be an object")
        return
    added = given.get("add") or []
    if not isinstance(added, list):
        yield Denial(Rule.WRONG_TYPE, f"{where}.add", "must be a list of texts")
        added = []
    for name in added:
        if name != ALWAYS_ALLOWED and not matches(str(name), allowed.allowed_capabilities):
            listed = words(allowed.allowed_capabilities)
            text = f"{name} is not allowed here; allowed are: {listed}"
            yield Denial(Rule.CAPABILITY, f"{where}.add", text)
    dropped = given.get("drop")
    if dropped is not None and dropped != ["ALL"]:
        # it would replace the list that every container gets
        yield Denial(Rule.ISOLATION, f"{where}.drop", "must be [ALL]: remove it")

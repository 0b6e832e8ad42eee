"""What a security context may not say, and what a refusal is.

Called by policy for the pod and for each container. The rules are those of Pod Security
`restricted`; nothing may be said that weakens what pod renders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Denial:
    """One thing that is refused."""

    rule: str
    """CamelCase name of the rule."""
    field: str
    """Path of the field."""
    message: str
    """What is wrong and what to do."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


SECURITY: dict[str, tuple[tuple[Any, ...], str]] = {
    "privileged": ((False,), "false"),
    "allowPrivilegeEscalation": ((False,), "false"),
    "runAsNonRoot": ((True,), "true"),
    "procMount": (("Default",), "Default"),
}
"""Fields of a security context: what may be said."""


def security(context: Any, where: str) -> Iterator[Denial]:
    """Everything that is refused in a security context."""
    if context is None:
        return
    if not isinstance(context, dict):
        yield Denial("WrongType", where, "must be an object")
        return
    for key, (allowed, text) in SECURITY.items():
        if key in context and context[key] not in allowed:
            yield Denial("Isolation", f"{where}.{key}", f"must be {text}: remove it")
    if context.get("runAsUser") == 0:
        yield Denial("Isolation", f"{where}.runAsUser", "must not be 0 (root): remove it")
    for key in ("sysctls", "windowsOptions", "seLinuxOptions"):
        if key in context:
            yield Denial("Isolation", f"{where}.{key}", "is refused: remove it")
    for key in ("seccompProfile", "appArmorProfile"):
        profile = context.get(key)
        if profile is not None and (
            not isinstance(profile, dict) or profile.get("type") == "Unconfined"
        ):
            yield Denial("Isolation", f"{where}.{key}", "must not be Unconfined: remove it")
    capabilities = context.get("capabilities")
    added = capabilities.get("add") if isinstance(capabilities, dict) else None
    if added not in (None, [], ["NET_BIND_SERVICE"]):
        yield Denial("Isolation", f"{where}.capabilities.add", "must be empty: remove it")
    dropped = capabilities.get("drop") if isinstance(capabilities, dict) else None
    if dropped is not None and dropped != ["ALL"]:
        # it would replace the list that every container gets
        yield Denial("Isolation", f"{where}.capabilities.drop", "must be [ALL]: remove it")

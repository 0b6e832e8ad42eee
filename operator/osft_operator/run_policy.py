"""What is read of a spec while its run goes on, whether the rest of it is valid or not.

Made by decide, used by steps, attempts, stall and gang. An upgrade may tighten a rule while a job
runs; then the job as a whole is invalid, and no pod is made of it any more, but its deadline, its
budget and its suspension hold. So only types are checked here, no bounds: those are in spec. Must
never be used to make something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from osft_operator import names
from osft_operator.spec import JobSpec


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True
    )


class StallPolicy(_Part):
    """`spec.stall`."""

    timeout_seconds: float
    action: str = "Report"


class RendezvousPolicy(_Part):
    """`spec.rendezvous`."""

    backend: str = "static"


class RunPolicy(_Part):
    """The fields of a spec that steer a run; each means what it means in JobSpec."""

    suspend: bool = False
    max_restarts: int = JobSpec.model_fields["max_restarts"].default
    active_deadline_seconds: int | None = None
    stall: StallPolicy | None = None
    rendezvous: RendezvousPolicy = RendezvousPolicy()
    queue_name: str | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> RunPolicy:
        """Read an OSFTJob. A field that cannot even be read counts as absent."""
        labels = body["metadata"].get("labels") or {}
        spec = {"queueName": labels.get(names.QUEUE_LABEL), **_without_nulls(body.get("spec"))}
        try:
            return cls.model_validate(spec)
        except ValidationError as error:
            unreadable = {each["loc"][0] for each in error.errors(include_url=False)}
        return cls.model_validate({k: v for k, v in spec.items() if k not in unreadable})


def _without_nulls(value: Any) -> dict[str, Any]:
    """An object as the API server reads it: null is absent."""
    if not isinstance(value, Mapping):
        return {}
    return {
        name: _without_nulls(each) if isinstance(each, Mapping) else each
        for name, each in value.items()
        if each is not None
    }

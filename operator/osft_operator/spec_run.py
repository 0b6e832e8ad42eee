"""`spec.rendezvous` and `spec.stall`: how a run's processes meet, and when it stands still.

Part of spec. Carried out in render and stall.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from osft_operator.spec_part import JobPart
from osft_trainer.report import METRICS_PORT


class Rendezvous(JobPart):
    """How the processes of all nodes find each other."""

    backend: Literal["static", "c10d"] = "static"
    """static: ranks follow the pods' numbers. c10d: the nodes agree on ranks among themselves; for
    closed networks only, since torch unpickles what whoever reaches the port writes there."""
    port: int = Field(default=23456, ge=1024, le=65535)
    """Port of the first node's store."""
    timeout_seconds: int = Field(default=600, ge=10, le=86400)
    """How long a node waits for the others, in seconds."""

    @model_validator(mode="after")
    def _check_port(self) -> Self:
        if self.port == METRICS_PORT:
            raise ValueError(f"port {self.port} is the one of /metrics: choose another")
        return self


class Stall(JobPart):
    """What to do when pods run and no progress comes."""

    timeout_seconds: int = Field(ge=60, le=604_800)
    """Time without a new step, phase or checkpoint after which the run counts as stalled, in
    seconds. Longer than the longest step, preparation of data or save."""
    action: Literal["Report", "Restart"] = "Report"
    """Report: condition Stalled and an event. Restart: also a new attempt, counted in
    maxRestarts."""

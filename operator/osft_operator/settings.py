"""The operator's settings: one frozen model, read once from OSFT_* environment variables.

Called by __main__ (which hands the model on) and by the chart's tests (which compare names). The
variable of a field is `OSFT_` and its name in capitals. Lists are separated by commas; a list that
is empty on purpose is `null`. An empty variable means the default; `null` means no value where a
field allows that. Must never be read again after the start, and never from
anywhere but `from_environ`.
"""

from __future__ import annotations

import difflib
import json
import os
import socket
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from osft_operator import process_tree
from osft_operator.policy_allowed import Allowed

PREFIX = "OSFT_"
"""Every environment variable of the operator begins so."""
OTHERS = (process_tree.VARIABLE,)
"""Variables with the prefix that are no settings: the tests' mark on their processes."""

WATCH_LOOKS = 2
"""So many looks in a row find silent watches behind, then they are opened anew; the next finds them
well."""
WATCH_OPENING_SECONDS = 15.0
"""For opening them anew, and for what the looks themselves take."""

Seconds = Annotated[float, Field(gt=0, le=86400)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(Allowed):
    """What an administrator decides. What a user decides is in the OSFTJob."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Pull policy of the trainer's image, for jobs that name none."""
    pytorch_job_shape: Literal["master-worker", "worker-only"] = "master-worker"
    """`worker-only` where Pod Security `restricted` refuses the init container of the workers."""
    run_as_user: int | None = Field(default=1000, ge=1)
    """User of the training pods, never root; `null` lets the platform choose (OpenShift)."""
    run_as_group: int | None = Field(default=1000, ge=0)
    """Group of the training pods; `null` lets the platform choose."""
    fs_group: int | None = Field(default=1000, ge=0)
    """Group that owns the mounted volumes; `null` lets the platform choose."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to work in, separated by commas; empty means the whole cluster."""
    operator_namespace: str = "osft-system"
    """Namespace the operator itself runs in; its Lease lives there."""
    instance_name: str = Field(default_factory=socket.gethostname, max_length=128)
    """Name of this replica (the pod's name), in the Lease and in events."""

    leader_election: bool = True
    """Whether replicas choose one to work, by a Lease. May be off for a single replica only."""
    lease_name: str = "osft-operator"
    """Name of the Lease."""
    lease_duration_seconds: Annotated[int, Field(ge=2, le=600)] = 15
    """A Lease that was not renewed for so long may be taken by another replica."""
    lease_renew_seconds: Seconds = 5
    """How often the leader renews the Lease; well below its duration."""

    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """OSFTJobs that are worked on at one time."""
    api_timeout_seconds: Seconds = 30
    """Longest wait for one answer of the API server."""
    backoff_initial_seconds: Seconds = 1
    """Wait after the first failed try of an OSFTJob; doubles with every further one."""
    backoff_max_seconds: Seconds = 300
    """Longest wait between two tries of an OSFTJob."""
    resync_seconds: Seconds = 300
    """How often everything is listed anew and compared with what was seen."""
    kind_check_seconds: Seconds = 30
    """How often it is looked whether a kind (PyTorchJob) has come or gone."""
    watch_check_seconds: Seconds = 20
    """How often it is looked whether the watches tell everything."""
    sidecar_grace_seconds: Annotated[float, Field(ge=0, le=86400)] = 60
    """How long other containers of a pod may outlive the trainers of all pods, which have ended
    well; then the job has succeeded, and its pods are deleted."""
    kueue: bool = False
    """Whether to read Kueue's Workloads, to say why a job waits in its queue."""

    progress_poll_seconds: Seconds = 10
    """How often a running job is asked for its progress."""
    progress_write_seconds: Annotated[float, Field(ge=0, le=86400)] = 30
    """Shortest time between two status writes that change nothing but progress."""
    progress_timeout_seconds: Seconds = 2
    """Longest wait for one answer of a training pod."""
    progress_concurrency: Annotated[int, Field(ge=1, le=1024)] = 32
    """Training pods that are asked at one time."""

    bind_address: str = "::"
    """Address that probes and metrics are served on. `::`: IPv6 and IPv4, or what of them is
    there."""
    probe_port: Port = 8081
    """Port of /healthz and /readyz; 0 takes a free one."""
    metrics_port: Port = 8080
    """Port of /metrics; 0 takes a free one."""
    metrics_per_job: bool = False
    """Whether /metrics tells each job's progress, loss and speed, labelled with its name."""
    loop_stall_seconds: Seconds = 30
    """Liveness fails when the event loop stood still for so long."""
    queue_stall_seconds: Seconds = 90
    """Liveness fails when OSFTJobs are due and none was taken up for so long."""
    watch_stall_seconds: Seconds = 75
    """Liveness fails when the watches have been behind the API server for so long."""

    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or plain text for people."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""

    @model_validator(mode="after")
    def _renewed_in_time(self) -> Self:
        if self.lease_renew_seconds * 2 > self.lease_duration_seconds:
            raise ValueError(
                f"OSFT_LEASE_RENEW_SECONDS is {self.lease_renew_seconds:g}, but one late renewal "
                f"must not lose the Lease: set it to at most half of OSFT_LEASE_DURATION_SECONDS "
                f"({self.lease_duration_seconds})"
            )
        return self

    @model_validator(mode="after")
    def _backs_off_upwards(self) -> Self:
        if self.backoff_initial_seconds > self.backoff_max_seconds:
            raise ValueError(
                f"OSFT_BACKOFF_INITIAL_SECONDS is {self.backoff_initial_seconds:g}, more than "
                f"OSFT_BACKOFF_MAX_SECONDS ({self.backoff_max_seconds:g}): make it the smaller one"
            )
        return self

    @model_validator(mode="after")
    def _watches_opened_anew_in_time(self) -> Self:
        needed = WATCH_LOOKS * self.watch_check_seconds + WATCH_OPENING_SECONDS
        if self.watch_stall_seconds < needed:
            raise ValueError(
                f"OSFT_WATCH_STALL_SECONDS is {self.watch_stall_seconds:g}, so liveness would fail "
                f"before silent watches are opened anew and found well: set it to at least "
                f"{needed:g} ({WATCH_LOOKS} times OSFT_WATCH_CHECK_SECONDS, which is "
                f"{self.watch_check_seconds:g}, and {WATCH_OPENING_SECONDS:g}), or look more often"
            )
        return self

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable of a field."""
        assert field in cls.model_fields, field
        return PREFIX + field.upper()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the settings.

        Raises:
            ValueError: naming each variable that is unknown or has no usable value.
        """
        known = {cls.variable(name): name for name in cls.model_fields}
        given = {k: v for k, v in environ.items() if k.startswith(PREFIX) and k not in OTHERS}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError("\n".join(_unknown(name, known) for name in unknown))
        values = {known[name]: _value(known[name], raw) for name, raw in given.items() if raw}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("\n".join(_problem(item) for item in error.errors())) from None


def _unknown(name: str, known: Mapping[str, str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{name} is no setting of the operator{hint}"


def _value(field: str, raw: str) -> Any:
    """A variable's text as pydantic's lax mode reads it."""
    is_list = isinstance(Settings.model_fields[field].default, tuple)
    if raw == "null":
        return () if is_list else None
    if is_list:
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    return raw


def _problem(item: Any) -> str:
    if not item["loc"]:
        return str(item["msg"]).removeprefix("Value error, ")
    variable = Settings.variable(str(item["loc"][0]))
    return f"{variable} is {json.dumps(item['input'])}: {item['msg']}"

"""What the operator tells Prometheus about itself and its jobs.

Names are controller-runtime's where the meaning is equal, so that existing dashboards work. Every
part counts its own work here; `serve` answers scrapes on a thread of its own. Labels are kept to
few values: a job's name is never one.
"""

from __future__ import annotations

from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

CONTROLLER = "osftjob"
"""Value of the `controller` and `name` labels."""

registry = CollectorRegistry()

reconciles = Counter(
    "controller_runtime_reconcile",
    "Passes over an OSFTJob, by how they ended.",
    ["controller", "result"],
    registry=registry,
)
reconcile_errors = Counter(
    "controller_runtime_reconcile_errors",
    "Passes over an OSFTJob that failed.",
    ["controller"],
    registry=registry,
)
reconcile_seconds = Histogram(
    "controller_runtime_reconcile_time_seconds",
    "Duration of a pass over an OSFTJob.",
    ["controller"],
    registry=registry,
)
queue_depth = Gauge("workqueue_depth", "OSFTJobs that wait.", ["name"], registry=registry)
queue_adds = Counter("workqueue_adds", "Keys put in the queue.", ["name"], registry=registry)
queue_retries = Counter("workqueue_retries", "Keys tried again.", ["name"], registry=registry)
queue_seconds = Histogram(
    "workqueue_queue_duration_seconds",
    "Wait in the queue before a pass.",
    ["name"],
    registry=registry,
)
api_requests = Counter(
    "rest_client_requests",
    "Requests to the API server, by status code and method.",
    ["code", "method"],
    registry=registry,
)
leader = Gauge(
    "leader_election_master_status",
    "1 while this replica is the one that works.",
    ["name"],
    registry=registry,
)
jobs = Gauge("osftjob_jobs", "OSFTJobs by phase.", ["phase"], registry=registry)
jobs_created = Counter(
    "osftjob_pytorchjobs_created", "PyTorchJobs made by the operator.", registry=registry
)
jobs_completed = Counter(
    "osftjob_completed", "OSFTJobs that ended, by how.", ["result"], registry=registry
)
status_writes = Counter(
    "osft_operator_status_writes", "Status writes to OSFTJobs.", registry=registry
)
progress_polls = Counter(
    "osft_operator_progress_polls",
    "Questions to training pods for their progress, by result.",
    ["result"],
    registry=registry,
)
watch_events = Counter(
    "osft_operator_watch_events", "Events seen by the watches.", ["kind"], registry=registry
)
resync_drift = Counter(
    "osft_operator_resync_drift",
    "Objects that a resync found changed or gone while the watches had said nothing.",
    ["kind"],
    registry=registry,
)
resync_timestamp = Gauge(
    "osft_operator_resync_timestamp_seconds", "When the last resync ended.", registry=registry
)
loop_lag = Gauge(
    "osft_operator_event_loop_lag_seconds", "How late the event loop is.", registry=registry
)


def count_phases(phases: dict[str, int]) -> None:
    """Set the gauge of jobs; a phase that no job is in any more goes to zero."""
    for (phase,) in list(jobs._metrics):
        jobs.labels(phase).set(phases.get(phase, 0))
    for phase, number in phases.items():
        jobs.labels(phase).set(number)


def serve(address: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer scrapes on a thread of its own.

    Returns:
        The port and a function that ends it.
    """
    server, thread = start_http_server(port, addr=address, registry=registry)
    assert isinstance(server, WSGIServer)

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close

"""What the operator tells Prometheus about itself.

Names are controller-runtime's where the meaning is equal, so that existing dashboards work. Every
part counts its own work here; `serve` answers scrapes on a thread of its own. What it tells about
its jobs is in job_metrics. Labels are kept to few values.
"""

from __future__ import annotations

import importlib.metadata
import platform
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
work_seconds = Histogram(
    "workqueue_work_duration_seconds", "Duration of a pass.", ["name"], registry=registry
)
longest_work = Gauge(
    "workqueue_longest_running_processor_seconds",
    "How long the longest pass under way has run.",
    ["name"],
    registry=registry,
)
unfinished_work = Gauge(
    "workqueue_unfinished_work_seconds",
    "How long all passes under way have run, together.",
    ["name"],
    registry=registry,
)
queue_oldest = Gauge(
    "osft_operator_queue_oldest_seconds",
    "How long the OSFTJob that waits longest has been due.",
    registry=registry,
)
api_requests = Counter(
    "rest_client_requests",
    "Requests to the API server, by status code, method and host.",
    ["code", "method", "host"],
    registry=registry,
)
leader = Gauge(
    "leader_election_master_status",
    "1 while this replica is the one that works.",
    ["name"],
    registry=registry,
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
watch_timestamp = Gauge(
    "osft_operator_watch_last_event_timestamp_seconds",
    "When a watch last told something.",
    ["kind"],
    registry=registry,
)
namespace_served = Gauge(
    "osft_operator_namespace_served",
    "1 while a watched namespace (* for all) can be listed and watched, 0 while it is left out.",
    ["watched_namespace"],
    registry=registry,
)
resync_drift = Counter(
    "osft_operator_resync_drift",
    "OSFTJobs of whose objects only a resync told, and no watch within ten seconds.",
    ["kind"],
    registry=registry,
)
PARTS = ("list", "watch", "decision", "status", "survey", "poll", "event")
"""Where an object can be set aside."""
set_aside = Counter(
    "osft_operator_set_aside",
    "Objects that could not be read or judged, by where, while the others went on: InvalidSpec is "
    "their author's, InternalError a bug.",
    ["part", "reason"],
    registry=registry,
)
resync_timestamp = Gauge(
    "osft_operator_resync_timestamp_seconds", "When the last resync ended.", registry=registry
)
loop_lag = Gauge(
    "osft_operator_event_loop_lag_seconds", "How late the event loop is.", registry=registry
)
build_info = Gauge(
    "osft_operator_build_info",
    "1, with the operator's version and Python's.",
    ["version", "python_version"],
    registry=registry,
)

# So that an alert sees the first failure: a series that is born at 1 has not increased.
reconcile_errors.labels(CONTROLLER)
for _result in ("success", "requeue_after", "error"):
    reconciles.labels(CONTROLLER, _result)
for _part in PARTS:
    set_aside.labels(_part, "InternalError")
set_aside.labels("decision", "InvalidSpec")


def serve(address: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer scrapes on a thread of its own.

    Returns:
        The port and a function that ends it.
    """
    build_info.labels(importlib.metadata.version("osft"), platform.python_version()).set(1)
    server, thread = start_http_server(port, addr=address, registry=registry)
    assert isinstance(server, WSGIServer)

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close

"""The operator's load as a table. Called by `make generate`; the numbers are operator_load's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
NAMES = {"osft": "osft-operator", "kopf": "plain kopf operator"}

Numbers = dict[str, Any]

ROWS: dict[str, tuple[str, Callable[[Numbers], object]]] = {
    "from the first start among all to the first decision, s": (
        "start",
        lambda n: _seconds_or_longer(n["start"]),
    ),
    "apply to PyTorchJob at {rate:g} creates/s, p50 / p99 / longest, s": (
        "apply_to_pytorchjob",
        lambda n: _spread(n["apply_to_pytorchjob"]),
    ),
    "of which the API server alone: its answer to the create": (
        "apply_to_pytorchjob",
        lambda n: _spread(n["apply_to_pytorchjob"].get("server_alone", {}).get("create_answered")),
    ),
    "and from there to its showing the OSFTJob to any watch": (
        "apply_to_pytorchjob",
        lambda n: _spread(n["apply_to_pytorchjob"].get("server_alone", {}).get("create_shown")),
    ),
    "CPU seconds a job: operator / control plane": (
        "apply_to_pytorchjob",
        lambda n: " / ".join(
            f"{n['apply_to_pytorchjob']['cpu_seconds_per_job'][part]:.3f}"
            for part in ("operator", "control_plane")
        ),
    ),
    "writes in a job's life, of which events": (
        "lives",
        lambda n: (
            f"{n['lives']['api_writes_per_job']:g}, "
            f"{n['lives']['api_writes_per_job_by_kind'].get('create events', 0):g}"
        ),
    ),
    "{jobs:,} finished jobs: CPU of a core": (
        "idle",
        lambda n: f"{n['idle']['cpu_percent_of_a_core']:g} %",
    ),
    "memory, MiB: now / started anew among all / at most, with the crowd below": (
        "peak_mib_of_last_process",
        lambda n: (
            f"{n['idle']['mib']:.0f} / {n['restart']['mib']:.0f} / "
            f"{n['peak_mib_of_last_process']:.0f}"
        ),
    ),
    "beside them running jobs that are polled: how many, CPU of a core": (
        "running",
        lambda n: f"{n['running']['jobs']}, {n['running']['cpu_percent_of_a_core']:g} %",
    ),
    "from a later start among all to the first decision, s": (
        "restart",
        lambda n: _seconds_or_longer(n["restart"]),
    ),
    "one job beside another tenant's thousands, s": (
        "crowd",
        lambda n: (
            f"{n['crowd']['single_seconds']:g} ({n['crowd']['crowd']:,} made, "
            f"{n['crowd']['crowd_waiting']:,} waited)"
        ),
    ),
}
"""What is shown of an operator's numbers: how the line begins, the part it is about, the cell.

A part that was not played, since the operator made no first decision, has empty cells.
"""


def load_tables() -> str:
    """All results of `operator_load` that are committed, as Markdown, the smallest first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("operator-load-*.json")]
    if not found:
        return "No result is committed yet: `make bench-operator`."
    found.sort(key=lambda result: int(result["jobs"]))
    return "\n\n".join(load_table(result) for result in found)


def load_table(result: Numbers) -> str:
    """One result as Markdown, a column for each operator."""
    machine, jobs = result["machine"], result["jobs"]
    ended = result["ended_before_the_operator_started"]
    before = f", {ended:,} of them finished before the operator started" if ended else ""
    operators = {name: result["operators"][name] for name in NAMES if name in result["operators"]}
    lines = [
        f"{jobs:,} OSFTJobs{before}; {machine['cores']} cores ({machine['cpu']}) for the operator, "
        f"the control plane ({machine['api_server']}), the benchmark and all else that ran:",
        "",
        _row(["", *(NAMES[name] for name in operators)]),
        _row(["---"] * (1 + len(operators))),
    ]
    for words, (part, cell) in ROWS.items():
        begin = words.format(rate=result["creates_per_second"], jobs=jobs)
        cells = [str(cell(n)) if part in n else "" for n in operators.values()]
        if any(cells):
            lines.append(_row([begin, *cells]))
    return "\n".join(lines)


def _spread(found: Numbers | None) -> str:
    if found is None:
        return ""
    return " / ".join(f"{found[f'{part}_seconds']:g}" for part in ("p50", "p99", "max"))


def _seconds_or_longer(found: Numbers) -> str:
    seconds = found["to_first_decision_seconds"]
    return f"more than {found['waited_at_most_seconds']}" if seconds is None else f"{seconds:g}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

"""The operator's load as a table. Called by `make generate`; the numbers are operator_load's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
NAMES = {"osft": "osft-operator", "kopf": "plain kopf operator"}

Numbers = dict[str, Any]

ROWS: dict[str, Callable[[Numbers], object]] = {
    "apply to PyTorchJob at {rate:g} creates/s, p50 / p99 / longest, s": lambda n: " / ".join(
        str(n["apply_to_pytorchjob"][f"{part}_seconds"]) for part in ("p50", "p99", "max")
    ),
    "CPU seconds a job: operator / control plane": lambda n: " / ".join(
        f"{n['apply_to_pytorchjob']['cpu_seconds_per_job'][part]:.3f}"
        for part in ("operator", "control_plane")
    ),
    "writes in a job's life, of which events": lambda n: (
        f"{n['lives']['api_writes_per_job']:g}, "
        f"{n['lives']['api_writes_per_job'] - n['lives']['api_writes_per_job_without_events']:g}"
    ),
    "{jobs:,} finished jobs: CPU of a core": lambda n: f"{n['idle']['cpu_percent_of_a_core']:g} %",
    "memory, MiB: now / started anew among all / at most, with the crowd below": lambda n: (
        f"{n['idle']['mib']:.0f} / {n['restart']['mib']:.0f} / {n['peak_mib_of_last_process']:.0f}"
    ),
    "beside them running jobs that are polled: how many, CPU of a core": lambda n: (
        f"{n['running']['jobs']}, {n['running']['cpu_percent_of_a_core']:g} %"
        if "running" in n
        else ""
    ),
    "from start among all to the first decision, s": lambda n: n["restart"][
        "to_first_decision_seconds"
    ],
    "one job beside another tenant's thousands, s": lambda n: (
        f"{n['crowd']['single_seconds']:g} ({n['crowd']['crowd']:,} made, "
        f"{n['crowd']['crowd_waiting']:,} waited)"
    ),
}
"""What is shown of an operator's numbers, and how the line begins."""


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
        f"the control plane ({machine['api_server']}), the benchmark and whoever else was there:",
        "",
        _row(["", *(NAMES[name] for name in operators)]),
        _row(["---"] * (1 + len(operators))),
    ]
    for words, cell in ROWS.items():
        begin = words.format(rate=result["creates_per_second"], jobs=jobs)
        lines.append(_row([begin, *(str(cell(numbers)) for numbers in operators.values())]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

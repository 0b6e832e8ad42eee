"""Writes what `make soak` has measured to tests/bench/results/soak.json.

Registered by conftest where OSFT_SOAK is set. A test hands its figures to pytest's fixture
`record_property`, with the unit in the name; its outcome and its time come from pytest. Tests that
did not run this time keep what an earlier run wrote of them, with that run's date. Must never
change an outcome.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest

COMMAND = "make soak"
RESULT = Path(__file__).parent / "bench" / "results" / "soak.json"
DIGITS = 3
"""Of a figure, behind the point."""
WORST_FIRST = ("failed", "unfinished", "passed", "skipped")
"""Outcomes; unfinished is a test that was interrupted."""


class SoakRecord:
    """A pytest plugin that keeps the reports of one session."""

    def __init__(self, path: Path = RESULT) -> None:
        self._path = path
        self._files: dict[str, dict[str, Any]] = {}
        """By file: the day and, by test, its entry."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one phase of a test: set-up, call or tear-down."""
        path, _, test = report.nodeid.partition("::")
        today = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "tests": {}}
        tests = self._files.setdefault(Path(path).name, today)["tests"]
        entry = tests.setdefault(test, {"outcome": "unfinished"})
        if report.outcome != "passed" or report.when == "call":
            entry["outcome"] = report.outcome
        if report.when == "call":
            entry["test_seconds"] = round(report.duration, DIGITS)
            entry.update({name: _plain(value) for name, value in report.user_properties})

    def pytest_sessionfinish(self) -> None:
        """Put this session's tests in the place of what is known of them."""
        if not self._files:
            return
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        files = known.get("files", {})
        for name, new in self._files.items():
            tests = {**files.get(name, {}).get("tests", {}), **_folded(new["tests"])}
            files[name] = {"date": new["date"], "tests": dict(sorted(tests.items()))}
        whole = {"machine": _machine(), "command": COMMAND, "files": dict(sorted(files.items()))}
        self._path.write_text(json.dumps(whole, indent=1) + "\n")


def _folded(tests: dict[str, Any]) -> dict[str, Any]:
    """The cases of one test as one entry, unless they have figures of their own."""
    found: dict[str, Any] = {}
    for test, entry in tests.items():
        function, _, case = test.partition("[")
        if not case or entry.keys() - {"outcome", "test_seconds"}:
            found[test] = entry
            continue
        whole = found.setdefault(function, {"outcome": "skipped", "test_seconds": 0.0, "cases": 0})
        whole["outcome"] = min(whole["outcome"], entry["outcome"], key=WORST_FIRST.index)
        whole["cases"] += 1
        seconds = whole["test_seconds"] + entry.get("test_seconds", 0.0)
        whole["test_seconds"] = round(seconds, DIGITS)
    return found


def _plain(value: object) -> object:
    return round(value, DIGITS) if isinstance(value, float) else value


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(os.sched_getaffinity(0))} cores"

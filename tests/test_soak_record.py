"""What the long tests have measured is written down, also of the tests that did not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SESSION = """
import sys, pytest
from pathlib import Path
from soak_record import SoakRecord
pytest.main(sys.argv[2:], plugins=[SoakRecord(Path(sys.argv[1]))])
"""
TESTS = """
import pytest

def test_measures(record_property):
    record_property("recovery_seconds", 1.23456)
    record_property("kills", 50)

def test_fails():
    assert False

@pytest.fixture
def broken():
    raise ValueError

def test_cannot_begin(broken):
    pass

@pytest.mark.parametrize("case", [0, 1, 2])
def test_of_cases(case):
    assert case != 2

@pytest.mark.parametrize("case", [0])
def test_of_measured_cases(case, record_property):
    record_property("figure", 7)

@pytest.mark.skip
def test_is_left_out():
    pass

def test_is_interrupted():
    raise KeyboardInterrupt
"""


def session(folder: Path, *options: str) -> dict[str, Any]:
    written = folder / "soak.json"
    told = [str(folder / "test_long.py"), f"--rootdir={folder}", *options]
    subprocess.run(
        [sys.executable, "-c", SESSION, str(written), *told],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def test_outcomes_and_figures_are_written(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text(TESTS)
    tests = session(tmp_path)["files"]["test_long.py"]["tests"]
    assert {name: entry["outcome"] for name, entry in tests.items()} == {
        "test_measures": "passed",
        "test_fails": "failed",
        "test_of_cases": "failed",
        "test_of_measured_cases[0]": "passed",
        "test_cannot_begin": "failed",
        "test_is_left_out": "skipped",
        "test_is_interrupted": "unfinished",
    }
    assert tests["test_measures"]["recovery_seconds"] == 1.235
    assert tests["test_measures"]["kills"] == 50
    assert tests["test_of_cases"]["cases"] == 3
    assert tests["test_of_measured_cases[0]"]["figure"] == 7
    assert 0 <= tests["test_measures"]["test_seconds"] < 60


def test_what_did_not_run_this_time_stays(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text(TESTS)
    before = session(tmp_path)["files"]["test_long.py"]["tests"]
    (tmp_path / "test_long.py").write_text(TESTS.replace("1.23456", "2").replace("50", "7"))
    after = session(tmp_path, "-k", "test_measures")["files"]["test_long.py"]["tests"]
    assert after.pop("test_measures")["kills"] == 7
    before.pop("test_measures")
    assert after == before

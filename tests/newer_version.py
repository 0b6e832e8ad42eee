"""The next version of operator and trainer: today's sources with one more parameter, in a folder.

Made by tests of version skew, which run it as a process beside the code under test. Its parameter
is `future_knob`, and one default of today is another there, as a release may change it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARAMETER, DEFAULT = "future_knob", 0.5
CHANGED, CHANGED_DEFAULT = "keep_checkpoints", 3
"""A parameter of today whose default the next version has changed, and to what."""

_SEED = "    seed: int = Field("
_NEW = f'''    {PARAMETER}: float = Field(default={DEFAULT}, ge=0, le=1)
    """What only the next version knows."""
'''
_OLD_DEFAULT = f"{CHANGED}: int = Field(default=2,"
_NEW_DEFAULT = f"{CHANGED}: int = Field(default={CHANGED_DEFAULT},"


def make(folder: Path) -> Path:
    """Write the sources; returns what to put on PYTHONPATH."""
    for package in ("operator/osft_operator", "trainer_image/osft_trainer"):
        source = ROOT / package
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "osft_trainer" / "config.py"
    text = config.read_text()
    assert text.count(_SEED) == text.count(_OLD_DEFAULT) == 1
    config.write_text(text.replace(_SEED, _NEW + _SEED).replace(_OLD_DEFAULT, _NEW_DEFAULT))
    return folder


def ask(sources: Path, program: str, **given: Any) -> Any:
    """Run a program of that version.

    Args:
        sources: what `make` returned.
        program: Python; finds `given` as a dict, and sets `answer`.
        given: what it is given; JSON.

    Returns:
        The answer; JSON.
    """
    whole = f"import json, sys\ngiven = json.load(sys.stdin)\n{program}\nprint(json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", whole],
        input=json.dumps(given),
        env={**os.environ, "PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

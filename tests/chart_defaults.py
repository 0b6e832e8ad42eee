"""Writes the chart's files/defaults.yaml: the values of values.yaml without their comments.

Called by `make generate`; test_chart_values compares. A value whose null means something (the
platform chooses) is left out: null removes it, and to fill it in again would undo that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "charts" / "osft-operator"
FILE = CHART / "files" / "defaults.yaml"
HEADER = "# Written by `make generate` from values.yaml. Do not edit.\n"
NULL_MEANS_SOMETHING = ("runAsUser", "runAsGroup", "fsGroup")


def text() -> str:
    """The file as it should be."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return HEADER + yaml.safe_dump(_kept(values), sort_keys=False, width=100)


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _kept(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in NULL_MEANS_SOMETHING
    }


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")
    sys.exit()

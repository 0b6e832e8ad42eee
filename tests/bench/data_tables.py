"""What the benchmarks of data found, as Markdown; for `make generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def data_tables() -> str:
    """Preparation, packing and collation, from the results that are committed."""
    lines = [
        "| file | rows | tokens | most resident memory | before the first row | MB/s per core |",
        "|---|---|---|---|---|---|",
    ]
    prepared = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("prepare-*.json"))]
    for each in prepared:
        speed = each["megabytes"] / each["processor_seconds"]
        lines.append(
            f"| {each['megabytes']:,} MB {each['kind']} | {each['rows']:,} | {each['tokens']:,} | "
            f"{each['resident_megabytes']:.0f} MB | "
            f"{each['resident_megabytes_before_the_first_row']:.0f} MB | {speed:.1f} |"
        )
    return "\n".join([*lines, "", *_packing_lines(_result("packing.json"))])


def _packing_lines(found: dict[str, Any]) -> list[str]:
    mixes = found["mixes"]
    lines = [
        "Share of tokens lost to padding and to waiting for the fullest rank, log-normal lengths; "
        "LPT is "
        f"longest-processing-time ({found['machine']}):",
        "",
        "| ranks | samples a batch | tokens a pass | lost | with LPT | no plan loses less than |",
        "|---|---|---|---|---|---|",
    ]
    for mix in mixes:
        lost = mix["waiting"]
        lines.append(
            f"| {mix['world_size']} | {mix['batch']} | {mix['capacity']:,} | {lost['pack']:.2%} | "
            f"{lost['lpt']:.2%} | {lost['least']:.2%} |"
        )
    times = " and ".join(
        f"{each['median_milliseconds']:.1f} ms of {each['samples']:,} samples"
        for each in found["collation"]
    )
    return [
        *lines,
        "",
        f"A pass of {found['tokens']:,} tokens is laid together in {times} (a core's own time).",
    ]


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found

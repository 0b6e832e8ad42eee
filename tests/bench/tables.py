"""Tables from the results of the benchmarks. Called by the benchmarks and by `make generate`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PLAIN = "plain fine-tuning"
"""What the others are compared with."""

Numbers = dict[str, Any]


def training_tables() -> str:
    """All results of `train_step` that are committed, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("train-*.json"))]
    if not found:
        return "No result is committed yet: `make bench-train`, `make bench-gpu`."
    return "\n\n".join(training_table(result) for result in found)


def training_table(result: Numbers) -> str:
    """One result as Markdown: ratios to plain fine-tuning, with their spread over the rounds."""
    methods: dict[str, Numbers] = result["methods"]
    baseline = methods.get(PLAIN) or next(iter(methods.values()))
    on_cuda = result["device"] == "cuda"
    threads = "" if on_cuda else f", {result['threads']} threads"
    bases = ", random bases" if result.get("random_bases") else ""
    lines = [
        f"{result['shape']} ({result['weights'] / 1e6:,.0f} M weights), {result['dtype']}, "
        f"{result['tokens']} tokens a step, ratio {result['ratio']}{bases}, on "
        f"{result['machine']}{threads} ({result['date']}, torch {result['torch']}), "
        f"{len(baseline['step_seconds'])} {result.get('spread_over', 'rounds')}:",
        "",
    ]
    head = ["method", "step s", "x plain", "spread", "tokens/s", "static GB", "x plain"]
    head += ["peak GB", "x plain", "MFU"] if on_cuda else []
    head += ["load s", "decompose s", "from cache s", "state GB", "save s", "export s"]
    lines += [_row(head), _row(["---"] * len(head))]
    for name, numbers in methods.items():
        lines.append(_row([name, *_cells(numbers, baseline, result, on_cuda)]))
    failed: dict[str, str] = result.get("failed", {})
    lines += ["", *(f"- {name} {why}" for name, why in failed.items())] if failed else []
    return "\n".join(lines)


def recompute_tables() -> str:
    """All results of `recompute` that are committed, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("recompute-*.json"))]
    return "\n\n".join(recompute_table(result) for result in found)


def recompute_table(result: Numbers) -> str:
    """One result as Markdown: ratios to keeping everything, round by round."""
    modes: dict[str, Numbers] = result["modes"]
    first = next(iter(modes.values()))
    lines = [
        f"{result['shape']} ({result['weights'] / 1e6:,.0f} M weights), OSFT exact, "
        f"{result['tokens']} tokens a step, on {result['machine']}, {result['threads']} threads "
        f"({result['date']}, torch {result['torch']}), {_rounds(first)}:",
        "",
        _row(["", "step s", "ratio", "spread", "memory of a pass GB", "ratio", "first pass s"]),
        _row(["---"] * 7),
    ]
    for name, numbers in modes.items():
        pairs = zip(numbers["step_seconds"], first["step_seconds"], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        cells = [
            f"{statistics.median(numbers['step_seconds']):.2f}",
            f"**{statistics.median(ratios):.2f}**",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{numbers['bytes'] / 1e9:.2f}",
            f"**{numbers['bytes'] / first['bytes']:.2f}**",
            f"{statistics.median(numbers['first_pass_seconds']):.1f}",
        ]
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def _rounds(numbers: Numbers) -> str:
    return f"{len(numbers['step_seconds'])} rounds"


def _cells(numbers: Numbers, baseline: Numbers, result: Numbers, on_cuda: bool) -> list[str]:
    seconds = statistics.median(numbers["step_seconds"])
    mine, theirs = numbers["step_seconds"], baseline["step_seconds"]
    if len(mine) == len(theirs):
        ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    else:
        # A command that had to end early has more turns of one than of the other, or steps of one
        # turn beside medians of several: there are no pairs.
        ratios = [seconds / statistics.median(theirs)]
    static = sum(numbers["static_bytes"].values())
    cells = [
        f"{seconds:.3f}",
        f"**{statistics.median(ratios):.2f}**",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{result['tokens'] / seconds:,.0f}",
        f"{static / 1e9:.3f}",
        f"{static / sum(baseline['static_bytes'].values()):.2f}",
    ]
    if on_cuda:
        peak, flops = numbers["peak_bytes"], result["peak_flops"]
        cells += [f"{peak / 1e9:.1f}", f"{peak / baseline['peak_bytes']:.2f}"]
        cells.append("" if flops is None else f"{result['step_flops'] / seconds / flops:.0%}")
    start = numbers["start_seconds"]
    cells += [_number(start.get(part)) for part in ("load", "decompose", "decompose from cache")]
    saved = numbers["saved_bytes"]
    cells += ["" if saved is None else f"{saved / 1e9:.3f}", _number(numbers["save_seconds"])]
    return [*cells, _number(numbers["export_seconds"])]


def _number(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

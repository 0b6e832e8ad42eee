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
    found = _results("train-*.json")
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
    has_peak = all(numbers["peak_bytes"] is not None for numbers in methods.values())
    head += ["peak GB", "x plain", "MFU"] if has_peak else []
    head += ["load s", "decompose s", "from cache s", "state GB", "save s", "export s"]
    lines += [_row(head), _row(["---"] * len(head))]
    for name, numbers in methods.items():
        lines.append(_row([name, *_cells(numbers, baseline, result, has_peak)]))
    failed: dict[str, str] = result.get("failed", {})
    lines += ["", *(f"- {name} {why}" for name, why in failed.items())] if failed else []
    return "\n".join(lines)


def recompute_tables() -> str:
    """All results of `recompute` that are committed, as Markdown."""
    return "\n\n".join(recompute_table(found) for found in _results("recompute-*.json"))


def recompute_table(result: Numbers) -> str:
    """One result as Markdown: ratios to keeping everything, round by round."""
    modes: dict[str, Numbers] = result["modes"]
    first = next(iter(modes.values()))
    lines = [
        f"{result['shape']} ({result['weights'] / 1e6:,.0f} M weights), OSFT exact, "
        f"{result['tokens']} tokens a step, {_circumstances(result)}, {_rounds(first)}:",
        "",
        _row(["", "step s", "ratio", "spread", "memory of a pass GB", "ratio", "first pass s"]),
        _row(["---"] * 7),
    ]
    for name, numbers in modes.items():
        cells = [
            f"{statistics.median(numbers['step_seconds']):.2f}",
            *_ratio_cells(numbers["step_seconds"], first["step_seconds"]),
            f"{numbers['bytes'] / 1e9:.2f}",
            f"**{numbers['bytes'] / first['bytes']:.2f}**",
            f"{statistics.median(numbers['first_pass_seconds']):.1f}",
        ]
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def bases_tables() -> str:
    """All results of `decomposition` that are committed, as Markdown."""
    return "\n\n".join(bases_table(found) for found in _results("bases-*.json"))


def bases_table(result: Numbers) -> str:
    """One result as Markdown: the split beside a singular value decomposition, and the cache."""
    lines = [
        f"Split for `{result['form']}`, ratio {result['ratio']}, beside `torch.linalg.svd` in "
        f"float64, {_circumstances(result)}:",
        "",
        _row(["matrix", "svd s", "split s", "ratio", "spread", "largest angle to the exact one"]),
        _row(["---"] * 6),
    ]
    for found in result["bases"]:
        cells = [
            " x ".join(f"{side:,}" for side in found["shape"]),
            f"{statistics.median(found['svd_seconds']):.2f}",
            f"{statistics.median(found['seconds']):.2f}",
            *_ratio_cells(found["seconds"], found["svd_seconds"]),
            f"{found['largest_sine']:.0e}",
        ]
        lines.append(_row(cells))
    cache = result["cache"]
    full = statistics.median(cache["full_seconds"])
    return "\n".join(
        [
            *lines,
            "",
            f"The {cache['matrices']} matrices of one decoder block are ready after "
            f"{cache['empty_seconds']:.2f} s with an empty cache, after {full:.3f} s with a full "
            f"one: {cache['empty_seconds'] / full:.0f} times faster.",
        ]
    )


def checkpoint_tables() -> str:
    """All results of `checkpoint` that are committed, as Markdown."""
    return "\n\n".join(checkpoint_table(found) for found in _results("checkpoint-*.json"))


def checkpoint_table(result: Numbers) -> str:
    """One result as Markdown: what a save takes, and what of it a step waits for."""
    save, stall = result["save_seconds"], result["stall_seconds"]
    waited = statistics.median(stall) / statistics.median(save)
    slower = result["step_seconds_beside_a_save"] / result["step_seconds_alone"]
    return "\n".join(
        [
            f"{result['megabytes']:,.0f} MB of state, to {result['to']}, {_circumstances(result)}:",
            "",
            _row(["a save takes s", "the step waits s", "share", "steps meanwhile"]),
            _row(["---"] * 4),
            _row([_spread(save), _spread(stall), f"**{waited:.1%}**", f"x {slower:.2f}"]),
        ]
    )


def _results(pattern: str) -> list[Numbers]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def _circumstances(result: Numbers) -> str:
    return (
        f"on {result['machine']}, {result['threads']} threads ({result['date']}, torch "
        f"{result['torch']})"
    )


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def _ratio_cells(mine: list[float], theirs: list[float]) -> list[str]:
    """Median and spread of the ratios of the same rounds."""
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    return [f"**{statistics.median(ratios):.2f}**", f"{min(ratios):.2f} to {max(ratios):.2f}"]


def _rounds(numbers: Numbers) -> str:
    return f"{len(numbers['step_seconds'])} rounds"


def _cells(numbers: Numbers, baseline: Numbers, result: Numbers, has_peak: bool) -> list[str]:
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
    if has_peak:
        peak, flops = numbers["peak_bytes"], result["peak_flops"]
        cells += [f"{peak / 1e9:.2f}", f"{peak / baseline['peak_bytes']:.2f}"]
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

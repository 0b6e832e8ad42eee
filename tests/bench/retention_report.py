"""Table and picture of the retention benchmark, from its result file.

`make generate` puts the table into the README and the picture beside the result; both come from
the committed numbers alone.
"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_name("results") / "retention.json"
PICTURE = RESULT.with_suffix(".svg")
PROJECTION = RESULT.with_name("retention-projection.json")
"""AdamW's own step with values projected, and with gradients too, from the same base model."""
VALUES_ONLY = "osft exact, values only"
GRADIENTS_TOO = "osft exact, gradients too"
SHOWN = "conflicting, new word"
"""Task of the picture: the one on which methods differ most."""
COLORS = {
    "plain fine-tuning": "#888888",
    "LoRA": "#b58900",
    "PEFT OSF": "#6c71c4",
    "osft exact": "#268bd2",
    VALUES_ONLY: "#8fb4d9",
    GRADIENTS_TOO: "#3d5a80",
    "osft exact, adaptive ranks": "#7fb8e6",
    "osft core": "#2aa198",
    "osft factored": "#1b4f72",
    "osft activations, retention text": "#d33682",
    "osft activations, own text": "#dc322f",
    "plain fine-tuning, replay": "#444444",
    "osft activations, replay": "#7a0c0a",
}
LEFT, TOP, WIDTH, HEIGHT = 60, 20, 420, 300

Numbers = dict[str, Any]


def retention_tables() -> str:
    """The committed result as Markdown, or a word that there is none."""
    if not RESULT.is_file():
        return "No result is committed yet: `make bench-retention`."
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    machine = result["machine"]
    note = (
        f"New skill / old skills, share of exact answers after {result['steps']} steps; mean over "
        "three seeds, each with a base model of its own, in brackets the old skills' spread. "
        "`replay` learns the model's own text again, one sample for four new ones, as "
        f"`replayRatio: 0.25` does. {_version(result)}`{result['command']}`, {machine['cores']} "
        f"cores ({machine['cpu']}):"
    )
    more = (
        "The tasks with known words only, and the exception to an old skill, ask with words that "
        "the old skills use: of these inputs little lies in the free directions, and at a small "
        "ratio and the rates of the screen the split by activations does not learn them. Other "
        "settings, found on these tasks with one seed or two:"
    )
    lacking = (
        "What reads text, given text of two of the three old skills. New skill / these two, then "
        "the third, of which no text told:"
    )
    first = (
        "The old skills at the first step, of every 25th, at which the new one was learned to 99 % "
        "(of how many seeds, if not of all):"
    )
    parts = [
        note,
        final_table(result),
        more,
        room_table(result),
        _folded("On the way: when the new skill is just learned", first, first_table(result)),
        _folded("An old skill that the text lacks", lacking, gap_table(result)),
    ]
    if PROJECTION.is_file():
        parts.append(_projection(json.loads(PROJECTION.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def _version(result: Numbers) -> str:
    """Of what is measured; results without a word of it are older."""
    if result.get("shared_moments"):
        return ""
    return (
        "Measured before `osft exact` and `osft exact, adaptive ranks` shared second moments: they "
        "projected the values alone. "
    )


def _folded(summary: str, note: str, table: str) -> str:
    """A table that a page shows when its line is clicked."""
    return "\n\n".join([f"<details><summary>{summary}</summary>", note, table, "</details>"])


def _projection(result: Numbers) -> str:
    note = (
        "What was before second moments were shared: AdamW's own step, whose values are projected "
        "after it, and the same with projected gradients too. Both on one base model more, of the "
        "same kind, at their best of more rates; today "
        f"`{result['command']}` makes a base model for each seed:"
    )
    return _folded("Projected gradients beside projected values", note, final_table(result))


def final_table(result: Numbers) -> str:
    """A row a method at the setting that the screen found best, a column a task."""
    finals = result["finals"]
    tasks = _tasks(finals)
    lines = [_row(["method", "rate, ratio", *tasks]), "|---" * (len(tasks) + 2) + "|"]
    for method, job in result["best"].items():
        mine = [o for o in finals if o["job"]["method"] == method]
        cells = [_cell([o for o in mine if o["job"]["task"] == task]) for task in tasks]
        lines.append(_row([method, _setting(job), *cells]))
    return "\n".join(lines)


def first_table(result: Numbers) -> str:
    """The old skills when the new one was just learned."""
    return _setting_table([*result["finals"], *result["room"]], _first_cell)


def _first_cell(outcomes: Sequence[Numbers]) -> str:
    olds = [o["old_then"] for o in outcomes if o["old_then"] is not None]
    if not olds:
        return "not learned"
    of_all = "" if len(olds) == len(outcomes) else f", {len(olds)} of {len(outcomes)}"
    return f"{statistics.mean(olds):.2f} ({min(olds):.2f} to {max(olds):.2f}){of_all}"


def room_table(result: Numbers) -> str:
    """What more room and weight decay do."""
    of_setting = sorted(result["room"], key=lambda outcome: _room_setting(outcome["job"]))
    return _setting_table(of_setting, _cell, _tasks(result["finals"]))


def gap_table(result: Numbers) -> str:
    """What becomes of an old skill that the text lacks."""
    return _setting_table(result["gap"], _gap_cell)


def _setting_table(
    outcomes: Sequence[Numbers],
    cell: Callable[[Sequence[Numbers]], str],
    order: Sequence[str] | None = None,
) -> str:
    """A row a setting, a column a task, in this order or as they come."""
    there = _tasks(outcomes)
    tasks = [task for task in order or there if task in there]
    heads = ["method", "rate, ratio", "weight decay", *tasks]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for setting in dict.fromkeys(_room_setting(outcome["job"]) for outcome in outcomes):
        method, _, _, decay = setting
        mine = [o for o in outcomes if _room_setting(o["job"]) == setting]
        by_task = ([o for o in mine if o["job"]["task"] == task] for task in tasks)
        cells = [cell(of_task) if of_task else "" for of_task in by_task]
        lines.append(_row([method, _setting(mine[0]["job"]), f"{decay:g}", *cells]))
    return "\n".join(lines)


def _gap_cell(outcomes: Sequence[Numbers]) -> str:
    new, old = (statistics.mean(o[name] for o in outcomes) for name in ("new", "old"))
    lacking = [outcome["lacking"] for outcome in outcomes]
    spread = f" ({min(lacking):.2f} to {max(lacking):.2f})" if len(lacking) > 1 else ""
    return f"{new:.2f} / {old:.2f}, {statistics.mean(lacking):.2f}{spread}"


def _tasks(outcomes: Sequence[Numbers]) -> list[str]:
    return list(dict.fromkeys(outcome["job"]["task"] for outcome in outcomes))


def _room_setting(job: Numbers) -> tuple[str, float, float, float]:
    return job["method"], job["ratio"], job["learning_rate"], job["weight_decay"]


def picture(result: Numbers) -> str:
    """Every setting of the screen on one task as SVG: new skill to the right, old skills up."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="370" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="760" height="370" fill="white"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
        'stroke="#333333"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _place(share, share)
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{share:g}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{share:g}</text>')
    middle = LEFT + WIDTH / 2
    parts.append(
        f'<text x="{middle}" y="{TOP + HEIGHT + 38}" text-anchor="middle">new skill '
        f"({html.escape(SHOWN)})</text>"
    )
    parts.append(
        f'<text x="16" y="{TOP + HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {TOP + HEIGHT / 2})">old skills</text>'
    )
    shown = {method: color for method, color in COLORS.items() if method in result["best"]}
    for number, (method, color) in enumerate(shown.items()):
        y = TOP + 12 + 20 * number
        parts.append(f'<circle cx="{LEFT + WIDTH + 20}" cy="{y}" r="5" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 32}" y="{y + 4}">{html.escape(method)}</text>')
        for outcome in result["screen"]:
            if (outcome["job"]["method"], outcome["job"]["task"]) == (method, SHOWN):
                x, y_old = _place(outcome["new"], outcome["old"])
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y_old:.1f}" r="5" fill="{color}" '
                    'fill-opacity="0.75"/>'
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_picture() -> None:
    """Beside the result, if there is one."""
    if RESULT.is_file():
        text = picture(json.loads(RESULT.read_text(encoding="utf-8")))
        PICTURE.write_text(text, encoding="utf-8")


def _place(new: float, old: float) -> tuple[float, float]:
    return LEFT + WIDTH * new, TOP + HEIGHT * (1 - old)


def _setting(job: Numbers) -> str:
    rate = f"{job['learning_rate']:g}"
    if job["method"].startswith("plain fine-tuning"):
        return rate
    if job["method"] == "LoRA":
        return f"{rate}, rank {LORA_RANKS[job['ratio']]}"
    return f"{rate}, {job['ratio']:g}"


LORA_RANKS = {0.25: 8, 0.5: 32}
"""LoRA has no ratio: a small and a large rank stand in its place."""


def _cell(outcomes: Sequence[Numbers]) -> str:
    olds = [outcome["old"] for outcome in outcomes]
    spread = f" ({min(olds):.2f} to {max(olds):.2f})" if len(olds) > 1 else ""
    new = statistics.mean(outcome["new"] for outcome in outcomes)
    return f"{new:.2f} / {statistics.mean(olds):.2f}{spread}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

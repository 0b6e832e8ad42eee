"""The table of docs/chat-templates.md: what is learned of a row, by chat template.

Each cell is what became of a conversation that was rendered with the template's own text, as trl
carries it. Called by `readme_tables`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat_samples import TOOLS, agent, chat, real_masker, template_files
from osft_trainer.masking import MaskedText

_ASKED = ("ASKED1", "SAID1", "ASKED2", "SAID2")
_HEAD = (
    "templates",
    "system prompt",
    "second one",
    "developer",
    "calls and results",
    "content beside calls",
    "`reasoning_content`",
    "thoughts in `content`",
    "samples of a conversation",
    "end of an answer, of calls",
)


def template_table() -> str:
    """One line for all templates of which the same becomes."""
    found: dict[tuple[str, ...], list[str]] = {}
    for path in template_files():
        if not path.stem.endswith("_training"):  # what trl makes of another one of these
            found.setdefault(_line(path), []).append(path.stem)
    lines = [_row(_HEAD), _row(["---"] * len(_HEAD))]
    for cells, names in sorted(found.items(), key=lambda item: item[1]):
        lines.append(_row([", ".join(names), *cells]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _line(path: Path) -> tuple[str, ...]:
    """The cells of one template behind its name."""
    plain = chat(*_ASKED)
    system = chat(*_ASKED, system="RULE")
    second = [system[0], *system]
    developer = [{"role": "developer", "content": "RULE"}, *plain]
    calling = agent(thoughts=None)
    beside = copy.deepcopy(calling)
    beside[1]["content"] = "BESIDE"
    inside = chat("ASKED", "<think>\nTHOUGHT\n</think>\n\nSAID")
    texts = _texts(path, plain)
    assert texts is not None, "each takes a plain conversation"
    called = _texts(path, calling, TOOLS)
    ends = [*texts[-1].stops, *(sorted(called[0].stops - texts[-1].stops) if called else ())]
    return (
        _learned(path, system),
        _learned(path, second),
        _learned(path, developer),
        _learned(path, calling, TOOLS),
        _learned(path, beside, TOOLS),
        _thoughts(path),
        _learned(path, inside),
        "one" if len(texts) == 1 else "one a turn",
        ", ".join(f"`{end.replace('|', chr(92) + '|')}`" for end in ends),
    )


def _thoughts(path: Path) -> str:
    answer = chat("ASKED", "SAID")
    answer[1]["reasoning_content"] = "THOUGHT"
    calls = agent()[:2]
    places = {"answers": _texts(path, answer), "calls": _texts(path, calls, TOOLS)}
    if all(places.values()):
        return "yes"
    return ", ".join(f"of {name}" for name, texts in places.items() if texts) or "refused"


def _learned(path: Path, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    return "yes" if _texts(path, messages, tools) else "refused"


def _texts(
    path: Path, messages: list[dict[str, Any]], tools: list[Any] | None = None
) -> list[MaskedText] | None:
    """What the conversation becomes; None where it is refused."""
    try:
        return real_masker(path)[1].texts(messages, tools)
    except ValueError:
        return None

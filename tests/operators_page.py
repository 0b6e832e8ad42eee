"""What commands print, on the page for who runs the operator: written there, or compared.

Called by tests that bring a cluster into the state that the page speaks of. With OSFT_WRITE_PAGE
set (`make page`) a block of the page becomes what was printed just now; else it must have the same
words: numbers, ages, times and identifiers are free, so the page cannot go stale unnoticed.
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

PAGE = Path(__file__).parents[1] / "charts" / "osft-operator" / "README.md"

Said = tuple[str, str]
"""A command as people type it, and what it printed."""


def record(name: str, *said: Said, only_the_end: bool = False) -> None:
    """Write a block of the page, or see that it is true.

    Args:
        name: of the block: `<!-- begin output NAME -->`.
        said: the commands in their order.
        only_the_end: compare the last line alone, where how many lines there are is chance.

    Raises:
        AssertionError: the page says something else.
    """
    text = "\n".join(_shown(command, printed) for command, printed in said)
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- begin output {name} -->\n", f"\n<!-- end output {name} -->"
    assert begin in page, f"the page lacks {begin!r}"
    head, rest = page.split(begin)
    old, tail = rest.split(end)
    old = old.strip("\n")
    if os.environ.get("OSFT_WRITE_PAGE"):
        PAGE.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
        return
    if only_the_end:
        old, text = old.splitlines()[-1], text.splitlines()[-1]
    assert shape(text) == shape(old), "run `make page`, and read what it changes"


def shape(text: str) -> list[str]:
    """The words of an output, without what differs from run to run: order and number do, too."""
    text = re.sub(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{5,}\b", "#", text)
    text = re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)
    text = re.sub(r"(#[smhd])+", "#s", text)
    return sorted(set(text.split()))


def _shown(command: str, printed: str) -> str:
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    return textwrap.indent("\n".join([f"$ {command}", *lines]), "    ")

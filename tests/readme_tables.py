"""Writes the generated parts of the README: parameters, benchmarks. Run by `make generate`.

A generated part lies between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic.alias_generators import to_camel

from bench.retention_report import retention_tables, write_picture
from bench.tables import training_tables
from osft_trainer.arguments import describe
from osft_trainer.config import LaunchParameters, RunParameters, TrainingParameters

README = Path(__file__).parents[1] / "README.md"


def parameter_table() -> str:
    """All parameters: Python name, YAML name, default, meaning."""
    lines = ["| Python | YAML | default | meaning |", "|---|---|---|---|"]
    for model, prefix in ((TrainingParameters, "training."), (RunParameters, None)):
        for name, default, meaning in describe([model]):
            yaml_name = f"`{prefix}{to_camel(name)}`" if prefix else RUN_IN_YAML[name]
            lines.append(f"| `{name}` | {yaml_name} | {default} | {meaning} |")
    return "\n".join(lines)


def launch_table() -> str:
    """Parameters of processes and rendezvous."""
    lines = ["| Python | default | meaning |", "|---|---|---|"]
    rows = describe([LaunchParameters])
    return "\n".join(
        lines + [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in rows]
    )


RUN_IN_YAML = {
    "run_id": "(the object's uid)",
    "attempt": "(the operator's count)",
    "on_existing_run": "`onExistingRun`",
}
PARTS = {
    "parameters": parameter_table,
    "launch parameters": launch_table,
    "retention benchmark": retention_tables,
    "training benchmark": training_tables,
}


def filled(text: str) -> str:
    """The README with every generated part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        assert begin in text, f"README.md lacks {begin}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        part = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, part=part: part, text)
    return text


if __name__ == "__main__":
    write_picture()
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")

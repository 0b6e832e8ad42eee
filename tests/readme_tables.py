"""Writes generated parts of READMEs and docs: parameters, benchmarks, templates, rules, metrics.

Run by `make generate`.

A generated part lies between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

from pydantic.alias_generators import to_camel

from bench.data_tables import data_tables
from bench.load_tables import load_tables
from bench.retention_report import retention_tables, write_picture
from bench.tables import bases_tables, checkpoint_tables, recompute_tables, training_tables
from chart_rendering import notes
from osft_operator import job_metrics
from osft_operator.metrics import registry
from osft_operator.policy_security import Rule
from osft_trainer.arguments import describe
from osft_trainer.config import LaunchParameters, RunParameters, TrainingParameters
from template_table import template_table

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


def rule_table() -> str:
    """The rules of the policy, by name, with the sentence below each in the source."""
    lines = ["| rule | refuses |", "|---|---|"]
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(Rule))).body
    assert isinstance(definition, ast.ClassDef)
    for member, words in zip(definition.body[1::2], definition.body[2::2], strict=True):
        assert isinstance(member, ast.Assign)
        assert isinstance(words, ast.Expr)
        name, sentence = ast.literal_eval(member.value), ast.literal_eval(words.value)
        lines.append(f"| {name} | {' '.join(sentence.split())} |")
    return "\n".join(lines)


def metric_table() -> str:
    """Every series of /metrics; those of single jobs last."""
    lines = ["| name | labels | meaning |", "|---|---|---|"]
    for collector in dict.fromkeys(registry._names_to_collectors.values()):
        described = collector.describe()[0]
        suffix = {"counter": "_total", "histogram": "_bucket, _sum, _count"}.get(described.type, "")
        labels = ", ".join(getattr(collector, "_labelnames", ()))
        lines.append(f"| `{described.name}{suffix}` | {labels} | {described.documentation} |")
    rows = [(*job_metrics.INFO, "namespace, name, phase")]
    rows += [(name, words, "namespace, name") for name, words in job_metrics.PER_JOB.values()]
    lines += [f"| `{name}` | {labels} | {words} (perJob) |" for name, words, labels in rows]
    return "\n".join(lines)


def install_notes() -> str:
    """What `helm install` prints, as the README shows outputs."""
    return "\n" + textwrap.indent(notes({}), "    ") + "\n"


RUN_IN_YAML = {
    "run_id": "(the object's uid)",
    "attempt": "(the operator's count)",
    "on_existing_run": "`onExistingRun`",
}
TEMPLATES = README.parent / "docs" / "chat-templates.md"
CHART = README.parent / "charts" / "osft-operator" / "README.md"
PARTS = {
    README: {
        "parameters": parameter_table,
        "launch parameters": launch_table,
        "retention benchmark": retention_tables,
        "training benchmark": training_tables,
        "recomputation benchmark": recompute_tables,
        "bases benchmark": bases_tables,
        "checkpoint benchmark": checkpoint_tables,
        "data benchmark": data_tables,
    },
    TEMPLATES: {"chat templates": template_table},
    CHART: {
        "notes": install_notes,
        "rules": rule_table,
        "metrics": metric_table,
        "load": load_tables,
    },
}


def filled(path: Path) -> str:
    """A README with every generated part made anew."""
    text = path.read_text(encoding="utf-8")
    for name, make in PARTS[path].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        assert begin in text, f"{path} lacks {begin}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        part = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, part=part: part, text)
    return text


if __name__ == "__main__":
    write_picture()
    for readme in PARTS:
        readme.write_text(filled(readme), encoding="utf-8")

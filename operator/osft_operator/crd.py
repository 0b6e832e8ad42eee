"""The CustomResourceDefinition, written from the typed spec and status.

`python -m osft_operator.crd` writes crds/osftjobs.osft.dev.yaml and the chart's template;
`--check` writes nothing and fails when they differ. Called by `make generate` and `make verify`.
It must never say anything about a field that the models do not say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from osft_operator import names
from osft_operator.crd_fixed import FIXED
from osft_operator.crd_rules import RULES
from osft_operator.crd_schema import structural
from osft_operator.spec import JobSpec
from osft_operator.status_model import JobStatus

Object = dict[str, Any]

CRD_FILE = Path("crds/osftjobs.osft.dev.yaml")
CHART_FILE = Path("charts/osft-operator/templates/crd.yaml")
HEADER = "# Written by `make generate` from osft_operator.spec and status_model. Do not edit.\n"

SELECTABLE = "    selectableFields:\n    - jsonPath: .status.phase\n"
"""As it stands in the definition's YAML."""
SINCE_1_30 = '{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}\n'

COLUMNS = [
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress.summary", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("ETA", "string", ".status.progress.eta", 0),
    ("Nodes", "integer", ".spec.nnodes", 0),
    ("Restarts", "integer", ".status.restarts", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Model", "string", ".spec.training.modelPath", 1),
    ("Ratio", "number", ".spec.training.unfreezeRankRatio", 1),
    ("Step", "integer", ".status.progress.step", 1),
    ("Tokens/s", "number", ".status.progress.tokensPerSecond", 1),
    ("Kept", "string", ".status.retention.summary", 1),
    ("Checkpoint", "string", ".status.checkpoint.latest", 1),
    ("Reason", "string", ".status.reason", 1),
]
"""Columns of `kubectl get`: name, type, path, 1 for `-o wide` only."""

NOT_REQUIRED = {"spec.training": ["ckptOutputDir"]}
"""Fields that the typed spec always has and the operator fills in."""

LIST_KEYS = {"spec.storage.mounts": "name", "spec.env": "name", "status.conditions": "type"}
"""Lists whose entries are told apart by a field: no two are the same, and they merge by it."""


def crd() -> Object:
    """The CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": [names.CATEGORY],
            },
            "versions": [_version()],
        },
    }


def _version() -> Object:
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "selectableFields": [{"jsonPath": ".status.phase"}],
        "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
        "schema": {"openAPIV3Schema": schema()},
    }


def _column(name: str, kind: str, path: str, priority: int) -> Object:
    column: Object = {"name": name, "type": kind, "jsonPath": path}
    return {**column, "priority": priority} if priority else column


def schema() -> Object:
    """The schema of an OSFTJob, with the rules in their places."""
    root: Object = {
        "type": "object",
        "description": "An OSFT training run: teach a language model something new without taking "
        "away what it knows. One PyTorchJob per attempt.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{names.API_VERSION}"},
            "kind": {"type": "string", "description": names.KIND},
            "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
            "spec": structural(JobSpec),
            "status": _open(structural(JobStatus)),
        },
    }
    # else kstatus takes a job that the operator has not seen yet for one that is as it should be
    root["properties"]["status"]["default"] = {"observedGeneration": -1}
    for path, fields in NOT_REQUIRED.items():
        required = _at(root, path)["required"]
        required[:] = [name for name in required if name not in fields]
    for path, key in LIST_KEYS.items():
        keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
        _at(root, path).update(keyed)
        # the server wants it of a key
        _at(root, path)["items"].setdefault("required", [key])
    for rule in (*RULES, *FIXED):
        _at(root, rule.at).setdefault("x-kubernetes-validations", []).append(rule.to_dict())
    return root


def _open(status: Object) -> Object:
    """A schema in which nothing is required.

    An operator that is older than the definition writes what it knows, and must be able to.
    """
    kept = {name: value for name, value in status.items() if name != "required"}
    if "properties" in kept:
        kept["properties"] = {name: _open(part) for name, part in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = _open(kept["items"])
    return kept


def _at(root: Object, path: str) -> Object:
    """The schema at a path such as `spec.storage.mounts[]`."""
    found = root
    for part in filter(None, path.split(".")):
        found = found["properties"][part.removesuffix("[]")]
        if part.endswith("[]"):
            found = found["items"]
    return found


def crd_yaml() -> str:
    """The definition as it lies in crds/."""
    return HEADER + _dump(crd())


def chart_template() -> str:
    """The same in the chart: may be left out, stays on uninstall, and 1.29 gets what it knows."""
    definition = crd()
    spec = _dump({"spec": definition["spec"]}).replace("{{", '{{ "{{" }}')
    assert SELECTABLE in spec
    spec = spec.replace(SELECTABLE, f"{SINCE_1_30}{SELECTABLE}{{{{- end }}}}\n")
    head = _dump({key: definition[key] for key in ("apiVersion", "kind", "metadata")})
    keep = (
        "{{- if .Values.crds.keep }}\n"
        "  annotations:\n"
        "    helm.sh/resource-policy: keep\n"
        "{{- end }}\n"
    )
    body = head + keep + spec
    fill = '{{- include "osft-operator.defaults" . }}\n'
    return HEADER + fill + "{{- if .Values.crds.enabled }}\n" + body + "{{- end }}\n"


def _dump(value: Object) -> str:
    import yaml  # an extra of the operator; the definition itself needs none

    # with other characters escaped: some of those in patterns are line breaks to YAML
    text: str = yaml.safe_dump(value, sort_keys=False, width=100)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write the two files, or compare them; the repository's root is the working directory."""
    parser = argparse.ArgumentParser(prog="python -m osft_operator.crd", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a file would change")
    check = parser.parse_args(arguments).check
    stale = []
    for path, text in ((CRD_FILE, crd_yaml()), (CHART_FILE, chart_template())):
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(map(str, stale))}; run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

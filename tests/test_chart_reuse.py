"""`helm upgrade --reuse-values`: a chart that is given the values of an older one renders the same.

Helm then puts the older release's values in the place of values.yaml, so whatever was added since
is missing. Here values.yaml of a copy loses values, at random.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import chart_defaults
from chart_rendering import CHART, MATRIX, NAMESPACE, RELEASE, _texts
from drawn import examples

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def _paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every value and every group of values, by name; not those whose absence means something."""
    for name, value in values.items():
        if name in chart_defaults.NULL_MEANS_SOMETHING or above == ("global",):
            continue
        path = (*above, name)
        if not isinstance(value, dict) or not _has_meaningful_nulls(value):
            yield path
        if isinstance(value, dict):
            yield from _paths(value, path)


def _has_meaningful_nulls(values: dict[str, Any]) -> bool:
    return any(
        name in chart_defaults.NULL_MEANS_SOMETHING
        or (isinstance(value, dict) and _has_meaningful_nulls(value))
        for name, value in values.items()
    )


PATHS = [path for path in _paths(VALUES) if path[-1] not in ("cpu", "memory", "grafana_dashboard")]


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the chart whose values.yaml a test may change."""
    folder = tmp_path_factory.mktemp("older") / CHART.name
    return Path(shutil.copytree(CHART, folder))


def without(paths: list[tuple[str, ...]]) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    for *parents, last in paths:
        place: dict[str, Any] = values
        for part in parents:
            place = place.get(part, {})
        place.pop(last, None)
    return values


def rendered(chart: Path, values: dict[str, Any]) -> dict[str, str]:
    return _texts(values, chart, RELEASE, NAMESPACE)


LABELS = ("metrics", "dashboard", "labels")
CASES = ["everything", *range(examples(12))]


@pytest.mark.parametrize("case", CASES)
def test_values_that_an_older_release_did_not_have_get_their_defaults(
    case: str | int, older: Path
) -> None:
    draw = random.Random(case)
    name = "monitoring" if case == "everything" else draw.choice(list(MATRIX))
    removed = PATHS if case == "everything" else draw.sample(PATHS, draw.randint(1, len(PATHS)))
    # who gives labels of one's own gets these alone: a name of ours may have been taken out by null
    given = MATRIX[name].get("metrics", {}).get("dashboard", {}).get("labels")
    removed = [path for path in removed if not (given and path == LABELS[: len(path)])]
    (older / "values.yaml").write_text(yaml.safe_dump(without(removed)))
    assert rendered(older, MATRIX[name]) == rendered(CHART, MATRIX[name]), (name, removed)


@pytest.mark.parametrize("path", [("replicas",), ("metrics",), ("policy", "images"), ("crds",)])
def test_null_is_the_default(path: tuple[str, ...]) -> None:
    values: Any = None
    for part in reversed(path):
        values = {part: values}
    assert rendered(CHART, values) == rendered(CHART, {})


def test_what_is_empty_or_false_by_wish_stays_so() -> None:
    values = {"policy": {"images": []}, "crds": {"enabled": False}, "podLabels": {}}
    texts = rendered(CHART, values)
    assert not texts[f"{CHART.name}/templates/crd.yaml"].partition("\n")[2].strip()
    assert (
        'OSFT_ALLOWED_IMAGES\n              value: "null"'
        in texts[f"{CHART.name}/templates/deployment.yaml"]
    )


def test_the_defaults_are_up_to_date_and_every_template_has_them() -> None:
    assert chart_defaults.FILE.read_text() == chart_defaults.text(), "run `make generate`"
    for path in (CHART / "templates").rglob("*"):
        if path.is_file() and not path.name.startswith("_"):
            lines = [line for line in path.read_text().splitlines() if line.startswith("{{")]
            assert 'include "osft-operator.defaults" .' in lines[0], path.name

"""The CRD as text: complete, bounded, small, and equal in its two places."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from job_samples import Object, job
from osft_operator import crd
from osft_operator.crd_rules import GPUS, RULES
from osft_operator.spec import OSFTJob

ROOT = Path(__file__).parent.parent


def _fields(schema: Object, path: str = "") -> Iterator[tuple[str, Object]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _fields(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _fields(schema[key], f"{path}[]")


FIELDS = [each for each in _fields(crd.schema()) if each[0].startswith((".spec", ".status"))]


def test_every_field_is_described() -> None:
    missing = [
        path for path, field in FIELDS if not field.get("description") and not path.endswith("[]")
    ]
    assert missing == []


def test_every_text_list_and_map_is_bounded() -> None:
    unbounded = []
    for path, field in FIELDS:
        kind = field.get("type")
        free = "additionalProperties" in field or "x-kubernetes-preserve-unknown-fields" in field
        wanted = {
            "string": not {"maxLength", "enum"} & field.keys(),
            "array": "maxItems" not in field,
            "object": free and "maxProperties" not in field,
        }
        if wanted.get(kind or "", False):
            unbounded.append(path)
    assert unbounded == []


def test_nothing_that_a_structural_schema_may_not_have() -> None:
    forbidden = {"$ref", "$defs", "anyOf", "oneOf", "const", "title", "discriminator"}
    assert [path for path, field in FIELDS if forbidden & field.keys()] == []
    assert all(field.get("type") != "null" for _, field in FIELDS)


def test_defaults_are_visible_and_status_has_none() -> None:
    fields = dict(FIELDS)
    assert fields[".spec.training.lrScheduler"]["default"] == "cosine"
    assert fields[".spec.rendezvous"]["default"]["port"] == 23456
    assert "ckptOutputDir" not in fields[".spec.training"]["required"]
    filled = {path for path, field in FIELDS if ".status" in path and "default" in field}
    assert filled == {".status"}, "it says only that nobody has looked at the job yet"


def test_an_operator_of_another_version_can_write_its_status() -> None:
    """No choices that a newer one may have more of, and nothing that an older one may lack."""
    status = [(path, field) for path, field in FIELDS if path.startswith(".status")]
    assert [path for path, field in status if "enum" in field] == [".status.conditions[].status"]
    required = {path: field["required"] for path, field in status if "required" in field}
    assert required == {".status.conditions[]": ["type"]}


def test_nothing_is_filled_in_inside_of_lists() -> None:
    """Argo CD compares lists whole: a default in one is a difference that no sync removes."""
    filled = [path for path, field in FIELDS if "[]" in path and "default" in field]
    assert filled == []
    assert any(path.endswith("mounts[].readOnly") for path, _ in FIELDS)
    mount = {"name": "m", "claimName": "c", "mountPath": "/m"}
    assert (
        OSFTJob.model_validate(job({"spec.storage.mounts": [mount]}))
        .spec.storage.mounts[0]
        .read_only
    )


def test_plain_kubectl_can_apply_it() -> None:
    assert len(crd.crd_yaml().encode()) < 128 * 1024, "kubectl keeps a copy in an annotation"


@pytest.mark.parametrize(
    ("path", "text"), [(crd.CRD_FILE, crd.crd_yaml()), (crd.CHART_FILE, crd.chart_template())]
)
def test_the_files_are_up_to_date(path: Path, text: str) -> None:
    assert (ROOT / path).read_text() == text, "run `make generate`"


def test_the_chart_has_the_same_definition() -> None:
    lines = crd.chart_template().replace('{{ "{{" }}', "{{").splitlines()
    plain = "\n".join(line for line in lines if not line.startswith("{{-"))
    definition = yaml.safe_load(plain)
    assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert definition == crd.crd()


def test_a_text_that_must_say_something_is_not_blank() -> None:
    """A length alone lets white space through."""
    lax = [
        path
        for path, field in FIELDS
        if path.startswith(".spec")
        and field.get("minLength", 0) > 0
        and not {"pattern", "enum"} & field.keys()
    ]
    assert lax == []


def test_what_is_written_is_kept_as_it_is() -> None:
    body = job({"spec.env": [{"name": "A", "value": " x "}]})
    assert OSFTJob.model_validate(body).spec.env[0].value == " x "


def test_rules_about_amounts_are_cheap_enough_for_servers_that_do_not_see_their_length() -> None:
    """Before Kubernetes 1.34 a number or text counts as long as a request, whatever maxLength is.

    A match costs a tenth of its text times a quarter of its pattern; a rule may cost ten million.
    """
    request, budget = 3 * 2**20, 10_000_000
    found = [rule for rule in RULES if rule.at == "spec.resources"]
    for rule in found:
        patterns = re.findall(r"matches\('([^']*)'\)", rule.rule)
        cost = sum(request * 0.1 * max(1, len(each) * 0.25) for each in patterns) * len(GPUS)
        assert 0 < cost < budget / 2, rule.rule
    assert len(found) == 2

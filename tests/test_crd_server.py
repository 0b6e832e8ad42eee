"""The CRD on a real API server: every rule with an accepted and a refused sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from job_samples import GONE, RULES, SCHEMA, Object, Sample, job

from cluster.api import ApiError
from cluster.control_plane import ControlPlane

pytestmark = pytest.mark.cluster

DRY = "?dryRun=All&fieldValidation=Strict"


@pytest.fixture(scope="module")
def jobs_path(control_plane: ControlPlane) -> Iterator[str]:
    control_plane.create_namespace("crd-rules")
    yield "/apis/osft.dev/v1alpha1/namespaces/crd-rules/osftjobs"
    control_plane.delete_namespace("crd-rules")


@pytest.mark.parametrize("sample", [*RULES, *SCHEMA], ids=lambda sample: sample.name)
def test_each_rule_accepts_and_refuses(
    sample: Sample, control_plane: ControlPlane, jobs_path: str
) -> None:
    control_plane.api.post(jobs_path + DRY, job(sample.good))
    with pytest.raises(ApiError) as refusal:
        control_plane.api.post(jobs_path + DRY, job(sample.bad))
    assert refusal.value.code in (400, 422)
    assert sample.field in refusal.value.message
    assert sample.words in refusal.value.message

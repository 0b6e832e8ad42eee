"""The typed OSFTJob: the same samples as on the API server, and problems in words."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from job_samples import MINIMAL, Sample, job
from osft_operator.policy import denials
from osft_operator.spec import OSFTJob, problems
from rule_samples import RULES, SCHEMA

EQUAL_TO_SERVER = [*RULES, *SCHEMA]


@pytest.mark.parametrize("sample", EQUAL_TO_SERVER, ids=lambda sample: sample.name)
def test_each_rule_accepts_and_refuses_as_the_server_does(sample: Sample) -> None:
    assert problems(job(sample.good)) == []
    found = problems(job(sample.bad))
    assert len(found) >= 1
    field = sample.field.rsplit(".", 1)[-1].removesuffix("[]")
    assert any(field in line and sample.words in line for line in found), found


def test_every_problem_is_told_at_once() -> None:
    found = problems(
        job(
            {
                "spec.training.learningRates": 1,
                "spec.training.seed": -1,
                "spec.nnodes": 0,
                "spec.storage.checkpoints.siz": "1Gi",
                "metadata.name": "A",
            }
        )
    )
    assert [line.split(":")[0] for line in sorted(found)] == [
        "metadata.name",
        "spec.nnodes",
        "spec.storage.checkpoints.siz",
        "spec.training.learningRates",
        "spec.training.seed",
    ]
    assert "did you mean learningRate?" in "".join(found)
    assert "did you mean size?" in "".join(found)


@pytest.mark.parametrize("body", [None, 3, [], {}, {"spec": 1}, {"metadata": None, "spec": {}}])
def test_anything_can_be_asked_about(body: Any) -> None:
    assert problems(body)


def test_a_number_that_yaml_reads_as_text() -> None:
    read = yaml.safe_load("learningRate: 5e-6")["learningRate"]
    assert read == "5e-6", "PyYAML follows YAML 1.1 here"
    body = OSFTJob.model_validate(job({"spec.training.learningRate": read}))
    assert body.spec.training.learning_rate == 5e-6


def test_the_folder_is_the_jobs_own() -> None:
    assert OSFTJob.model_validate(MINIMAL).spec.training.ckpt_output_dir == "/checkpoints/sample"
    other = job({"spec.storage.checkpoints.mountPath": "/out"}, name="b")
    assert OSFTJob.model_validate(other).spec.training.ckpt_output_dir == "/out/b"
    assert denials(OSFTJob.model_validate(other)) == []

"""Operator, trainer image and definition of different versions: a run begins, and goes on.

The other version is the next one (newer_version), or what the last version before a parameter was
added is recorded to have known and written (older/trainer.json).
"""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import newer_version
from job_samples import Object, job
from newer_version import CHANGED, CHANGED_DEFAULT, DEFAULT, PARAMETER
from osft_operator.actions import CreatePyTorchJob
from osft_operator.causes import cause
from osft_operator.decide import decide
from osft_operator.observed import Observed
from osft_operator.resolved import RenderSettings
from osft_trainer import launch
from osft_trainer.arguments import DEFAULTS_ENV, from_argv
from osft_trainer.report import POD_IP_ENV, TERMINATION_LOG_ENV, ExitCode, Termination

SETTINGS = RenderSettings(trainer_image="trainer:1")
NOW = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
OLDER: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "older" / "trainer.json").read_text()
)

DECIDE = """
import datetime
from osft_operator.actions import CreatePyTorchJob
from osft_operator.decide import decide
from osft_operator.observed import Observed
from osft_operator.resolved import RenderSettings
now = datetime.datetime.fromisoformat(given["now"])
settings = RenderSettings(trainer_image="trainer:2")
answer = []
for body in given["bodies"]:
    made = []
    while not made:
        decision = decide(Observed(body, settings), now)
        body = {**body, "status": decision.status}
        made = [a.manifest for a in decision.actions if isinstance(a, CreatePyTorchJob)]
    answer.append([decision.status, made])
"""
READ = """
from osft_trainer.arguments import from_argv
answer = from_argv(given["argv"], defaults=given["defaults"]).training.model_dump(mode="json")
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newer_version.make(tmp_path_factory.mktemp("newer"))


def decided(body: Object) -> tuple[Object, list[Object]]:
    """Status and PyTorchJobs when this version's operator has made the attempt that is due."""
    made: list[Object] = []
    while not made:
        decision = decide(Observed(body, SETTINGS), NOW)
        body = {**body, "status": decision.status}
        made = [each.manifest for each in decision.actions if isinstance(each, CreatePyTorchJob)]
    return decision.status, made


def decided_by(newer: Path, *bodies: Object) -> list[tuple[Object, list[Object]]]:
    """The same of the next version's, for each of several jobs."""
    answer = newer_version.ask(newer, DECIDE, bodies=bodies, now=NOW.isoformat())
    return [(status, made) for status, made in answer]


def second(body: Object, status: Object) -> Object:
    """The job once its second attempt is recorded."""
    return {**body, "status": {**status, "attempt": 2, "pyTorchJobName": "sample-a2"}}


def told(made: list[Object]) -> tuple[list[str], str]:
    """What the trainer's container is given: arguments, and what is at its default."""
    container = trainer(made)
    variables = {each["name"]: each.get("value") for each in container["env"]}
    return container["args"], variables[DEFAULTS_ENV]


def trainer(made: list[Object]) -> Object:
    """The trainer's container."""
    (manifest,) = made
    spec = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    container: Object = spec["containers"][0]
    return container


def sample(**training: Any) -> Object:
    changes = {f"spec.training.{name}": value for name, value in training.items()}
    return job(changes, uid="u-1", generation=1)


def test_a_run_goes_on_with_the_next_operator_and_its_own_image(
    newer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The definition is of the next version by then, too: the API server fills in its defaults."""
    body = sample(keepCheckpoints=2)
    status, made = decided(body)
    first = told(made)
    upgraded = sample(keepCheckpoints=2, futureKnob=DEFAULT)
    ((_, made),) = decided_by(newer, second(upgraded, status))
    argv, defaults = told(made)
    assert trainer(made)["image"] == "trainer:1"
    assert not any(PARAMETER.replace("_", "-") in each for each in argv)
    with caplog.at_level(logging.WARNING):
        read = from_argv(argv, defaults=defaults)
    assert read.training == from_argv(first[0], defaults=first[1]).training
    assert f"{PARAMETER} ({DEFAULT})" in caplog.text


def test_a_new_job_trains_with_an_image_that_is_older_than_the_operator(newer: Path) -> None:
    """By spec.image, or by the older definition; and what the author sees is what is trained."""
    bodies = (sample(), sample(futureKnob=DEFAULT, keepCheckpoints=CHANGED_DEFAULT))
    for _, made in decided_by(newer, *bodies):
        argv, defaults = told(made)
        read = from_argv(argv, defaults=defaults).training
        assert getattr(read, CHANGED) == CHANGED_DEFAULT
        assert read.model_path == "/models/tiny"


def test_a_new_job_trains_with_an_image_that_is_newer_than_the_operator(newer: Path) -> None:
    argv, defaults = told(decided(sample(seed=7))[1])
    read = newer_version.ask(newer, READ, argv=argv, defaults=defaults)
    assert read[PARAMETER] == DEFAULT
    assert read["seed"] == 7
    assert read[CHANGED] == 2, "the definition says 2, whatever the image would do by itself"


def test_a_run_goes_on_when_the_operator_is_rolled_back(newer: Path) -> None:
    """The status has been the next version's; its definition went with it."""
    ((status, _),) = decided_by(newer, sample(futureKnob=DEFAULT))
    status = {**status, "futureField": {"a": 1}}
    argv, defaults = told(decided(second(sample(), status))[1])
    read = newer_version.ask(newer, READ, argv=argv, defaults=defaults)
    assert read[PARAMETER] == DEFAULT


def test_what_the_version_before_the_last_parameter_wrote_is_read() -> None:
    read = from_argv(OLDER["args"])
    assert read.run.attempt == 1
    assert read.training.replay_ratio == 0


def test_what_is_at_its_default_never_becomes_a_flag_that_an_older_image_does_not_know() -> None:
    argv, _ = told(decided(sample())[1])
    flags = {each.partition("=")[0].removeprefix("--").replace("-", "_") for each in argv}
    assert flags <= set(OLDER["parameters"])


@pytest.mark.parametrize("broken", ["{", "[1]", "7"])
def test_defaults_that_are_no_object_are_named(broken: str) -> None:
    with pytest.raises(ValueError, match=f"{DEFAULTS_ENV}: no JSON object"):
        from_argv(OLDER["args"], defaults=broken)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ("--future-knob=0.9", "unknown parameter '--future-knob'"),
        ("--split-by=hearsay", "split_by: "),
        ("--seed=-1", "seed: "),
    ],
)
def test_what_an_operator_wrote_and_the_image_does_not_take_is_no_verdict(
    wrong: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator had checked it, so versions differ; a person's own mistake is bad input."""
    log = tmp_path / "log"
    monkeypatch.setenv(TERMINATION_LOG_ENV, str(log))
    argv = [*OLDER["args"], wrong]
    assert launch.run_command(argv) == ExitCode.BAD_INPUT
    monkeypatch.setenv(POD_IP_ENV, "127.0.0.1")
    assert launch.run_command(argv) == ExitCode.TRY_AGAIN
    words = Termination.parse(log.read_bytes())
    assert words is not None
    assert words.reason == "VersionSkew"
    assert where in words.message


@pytest.mark.parametrize(
    ("code", "reason", "message", "final", "shown"),
    [
        (2, "BadInput", "unknown parameter '--future-knob'; see ...", False, "VersionSkew"),
        (75, "VersionSkew", "unknown parameter '--future-knob'; see ...", False, "VersionSkew"),
        (2, "BadInput", "data_path: line 3: unknown parameter '--x'", True, "BadInput"),
        (2, "BadInput", "model_path: no such folder", True, "BadInput"),
    ],
)
def test_an_unknown_parameter_does_not_end_the_job_for_good(
    code: int, reason: str, message: str, final: bool, shown: str
) -> None:
    words = Termination(reason=reason, exit_code=code, message=message).to_json()
    terminated = {"exitCode": code, "reason": "Error", "message": words}
    pod = {
        "metadata": {"name": "sample-master-0"},
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": "pytorch", "lastState": {"terminated": terminated}}],
        },
    }
    ended = cause([pod])
    assert ended is not None
    assert (ended.is_final, ended.reason) == (final, shown)
    assert ("use the image of the operator's version" in ended.message) is not final


def test_a_run_that_an_older_operator_has_begun_goes_on() -> None:
    """What is added to the record has a default, since older records lack it."""
    recorded = json.loads((Path(__file__).parent / "older" / "status.json").read_text())
    assert recorded["resolved"]["image"] == "trainer:0"
    _, made = decided(second(sample(), recorded))
    assert trainer(made)["image"] == "trainer:0"
    assert made[0]["metadata"]["name"] == "sample-a2"

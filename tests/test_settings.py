"""Settings from the environment: every variable counts, and a wrong one is named with its cure."""

from __future__ import annotations

import pytest

from osft_operator.settings import Settings


def test_defaults_need_no_environment() -> None:
    settings = Settings.from_environ({"HOME": "/root"})
    assert settings.namespaces == ()
    assert settings.leader_election is True
    assert (settings.probe_port, settings.metrics_port) == (8081, 8080)


def test_every_field_is_read_from_its_variable() -> None:
    given = {
        "OSFT_NAMESPACES": "team-a, team-b,",
        "OSFT_LEADER_ELECTION": "false",
        "OSFT_WORKERS": "3",
        "OSFT_PROGRESS_POLL_SECONDS": "0.5",
        "OSFT_RUN_AS_USER": "null",
        "OSFT_RUN_AS_GROUP": "0",
        "OSFT_FS_GROUP": "2000",
        "OSFT_TRAINER_IMAGE": "example/trainer:1",
        "OSFT_LOG_LEVEL": "",
    }
    settings = Settings.from_environ(given)
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.leader_election is False
    assert settings.workers == 3
    assert settings.progress_poll_seconds == 0.5
    assert settings.run_as_user is None
    assert settings.run_as_group == 0, "root's group is no root"
    assert settings.fs_group == 2000
    assert settings.trainer_image == "example/trainer:1"
    assert settings.log_level == "INFO", "an empty variable means the default"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"OSFT_WORKER": "3"}, ["OSFT_WORKER is no setting", "did you mean OSFT_WORKERS"]),
        ({"OSFT_WORKERS": "many"}, ['OSFT_WORKERS is "many"', "integer"]),
        ({"OSFT_WORKERS": "0"}, ['OSFT_WORKERS is "0"', "greater than or equal to 1"]),
        ({"OSFT_WORKERS": "null"}, ["OSFT_WORKERS is null"]),
        ({"OSFT_RUN_AS_USER": "0"}, ['OSFT_RUN_AS_USER is "0"', "greater than or equal to 1"]),
        ({"OSFT_PYTORCH_JOB_SHAPE": "ring"}, ["OSFT_PYTORCH_JOB_SHAPE", "worker-only"]),
        (
            {"OSFT_LEASE_RENEW_SECONDS": "10", "OSFT_LEASE_DURATION_SECONDS": "15"},
            ["OSFT_LEASE_RENEW_SECONDS is 10", "at most half of OSFT_LEASE_DURATION_SECONDS (15)"],
        ),
        (
            {"OSFT_BACKOFF_MAX_SECONDS": "0.5"},
            ["OSFT_BACKOFF_INITIAL_SECONDS is 1", "OSFT_BACKOFF_MAX_SECONDS (0.5)"],
        ),
        (
            {"OSFT_WATCH_CHECK_SECONDS": "60"},
            ["OSFT_WATCH_STALL_SECONDS is 75", "at least 135", "OSFT_WATCH_CHECK_SECONDS"],
        ),
    ],
)
def test_a_wrong_variable_is_named(given: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Settings.from_environ(given)
    for word in words:
        assert word in str(error.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().workers = 4  # type: ignore[misc]

"""What a line of the log says, for machines and for people."""

from __future__ import annotations

import json
import logging
import shlex

import pytest

from osft_operator import logs


def line(formatter: logging.Formatter, **extra: object) -> str:
    record = logging.makeLogRecord({"msg": "New -> %s", "args": ("Pending",), **extra})
    return formatter.format(record)


def formatter(style: str) -> logging.Formatter:
    logs.configure(style, "INFO")
    (handler,) = logging.getLogger().handlers
    found = handler.formatter
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _root_as_it_was() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_line_names_the_job_and_the_pass_as_long_as_it_is_about_them(style: str) -> None:
    form = formatter(style)
    with logs.about(osftjob="team/run", reconcile_id="abc"):
        said = line(form, detail='no room: "gpu" = 8')
    if style == "json":
        fields = json.loads(said)
    else:
        assert "New -> Pending osftjob=team/run " in said
        fields = dict(word.split("=", 1) for word in shlex.split(said) if "=" in word)
    assert (fields["osftjob"], fields["reconcile_id"]) == ("team/run", "abc")
    assert fields["detail"] == 'no room: "gpu" = 8'
    assert "team/run" not in line(form)


def test_a_text_cannot_forge_a_second_line() -> None:
    form = formatter("text")
    said = line(form, detail="a\n2026-01-01 00:00:00 INFO forged")
    assert said.count("\n") == 0
    record = logging.makeLogRecord({"msg": "a\nb", "exc_info": None})
    assert form.format(record).count("\n") == 0


def test_a_traceback_follows_the_line() -> None:
    form = formatter("text")
    try:
        raise RuntimeError("why")
    except RuntimeError as error:
        info = (type(error), error, error.__traceback__)
        with logs.about(osftjob="team/run"):
            first, *rest = line(form, exc_info=info).splitlines()
    assert first.endswith("osftjob=team/run")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "RuntimeError: why"

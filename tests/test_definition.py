"""What a newer definition fills in, and what an author has set: fields this version lacks."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from kubernetes import client

from job_samples import Object, job
from osft_operator.cluster import Cluster, Unavailable
from osft_operator.definition import FRESH_SECONDS, Definition
from osft_operator.older_definition import FORGET_SECONDS, OlderDefinition
from osft_operator.spec import OSFTJob
from osft_operator.unknown_fields import unknown_fields, without_defaults


def _object(**properties: Object) -> Object:
    return {"type": "object", "properties": properties}


NEW = {"enabled": False, "budget": 0.1}
SCHEMA = _object(
    spec=_object(
        training=_object(futureKnob={"type": "number", "default": 0.5}, chosen={"type": "string"}),
        protection={**_object(enabled={"type": "boolean"}), "default": NEW},
        storage=_object(
            mounts={"type": "array", "items": _object(watch={"type": "boolean", "default": True})}
        ),
    )
)
MOUNT = {"name": "m", "claimName": "c", "mountPath": "/m"}
FILLED = [
    {"spec.training.futureKnob": 0.5},
    {"spec.protection": NEW},
    {"spec.storage.mounts": [MOUNT, {**MOUNT, "name": "n", "mountPath": "/n", "watch": True}]},
    {"spec.training.futureKnob": 0.5, "spec.protection": NEW},
]
SET = [
    {"spec.training.futureKnob": 0.4},
    {"spec.training.chosen": "a"},
    {"spec.protection": {**NEW, "enabled": True}},
    {"spec.training.misspelt": 1},
    {"spec.storage.mounts": [{**MOUNT, "watch": False}]},
]


@pytest.mark.parametrize("changes", FILLED)
def test_what_the_definition_fills_in_is_left_out(changes: dict[str, Any]) -> None:
    body = job(changes)
    before = json.dumps(body)
    rest, left_out = without_defaults(body, unknown_fields(body), SCHEMA)
    assert left_out
    assert unknown_fields(rest) == []
    OSFTJob.model_validate(rest)
    assert json.dumps(body) == before


@pytest.mark.parametrize("changes", SET)
@pytest.mark.parametrize("schema", [SCHEMA, {}])
def test_what_an_author_set_stays(changes: dict[str, Any], schema: Object) -> None:
    body = job(changes)
    rest, left_out = without_defaults(body, unknown_fields(body), schema)
    assert (rest, left_out) == (body, {})
    assert len(unknown_fields(rest)) == 1


@pytest.mark.parametrize("spec", [None, 7, [], "x", {"training": 7, "storage": {"mounts": 7}}])
def test_what_is_no_object_has_no_fields(spec: Any) -> None:
    assert unknown_fields({"spec": spec}) == []


class Published(http.server.BaseHTTPRequestHandler):
    """An API server that publishes schemas as kube-apiserver does, or refuses to."""

    code: ClassVar[int] = 200
    schema: ClassVar[Object] = SCHEMA
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind = {"group": "osft.dev", "version": "v1alpha1", "kind": "OSFTJob"}
        listed = {"x-kubernetes-group-version-kind": [{**kind, "kind": "OSFTJobList"}]}
        schemas = {
            "a.List": listed,
            "b.Job": {"x-kubernetes-group-version-kind": [kind], **self.schema},
        }
        body = json.dumps({"openapi": "3.0.0", "components": {"schemas": schemas}}).encode()
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(Published, "asked", [])
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Published)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{listening.server_port}")
    cluster = Cluster(configuration, threads=1)
    yield cluster
    cluster.close()
    listening.shutdown()
    listening.server_close()


def test_the_definition_is_read_when_a_job_needs_it_and_then_kept(
    server: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    definition = Definition(server, clock=lambda: now[0])

    def understood(changes: dict[str, Any]) -> Object:
        return asyncio.run(definition.understood(job(changes)))

    assert understood({}) == job()
    assert Published.asked == []
    for _ in range(3):
        assert understood(FILLED[0]) == job()
    assert Published.asked == ["/openapi/v3/apis/osft.dev/v1alpha1"]
    late = {"spec.training.later": 1}
    assert understood(late) == job(late)
    monkeypatch.setattr(
        Published, "schema", _object(spec=_object(training=_object(later={"default": 1})))
    )
    assert understood(late) == job(late), "read a moment ago"
    now[0] += FRESH_SECONDS
    assert understood(late) == job()
    assert len(Published.asked) == 2


@pytest.mark.parametrize("code", [403, 404])
def test_where_it_may_not_be_read_every_field_counts_as_set(
    code: int, server: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Published, "code", code)
    definition = Definition(server)
    assert asyncio.run(definition.understood(job(FILLED[0]))) == job(FILLED[0])
    assert "cannot be read" in caplog.text


def test_a_server_that_is_away_is_asked_again(
    server: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Published, "code", 503)
    definition = Definition(server)
    with pytest.raises(Unavailable):
        asyncio.run(definition.understood(job(FILLED[0])))
    monkeypatch.setattr(Published, "code", 200)
    assert asyncio.run(definition.understood(job(FILLED[0]))) == job()


def test_what_an_older_definition_lacks_is_left_out_for_a_while() -> None:
    now = [0.0]
    older = OlderDefinition(clock=lambda: now[0])
    status = {"phase": "Running", "new": {"a": 1}, "resolved": {"image": "x", "new": 2}}
    assert older.fit(status) == status
    older._learn(status, {"phase": "Running", "resolved": {"image": "x"}})
    assert older.fit(status) == {"phase": "Running", "resolved": {"image": "x"}}
    older._learn(older.fit(status), {"resolved": {"image": "x"}})
    assert older.fit(status) == {"resolved": {"image": "x"}}
    now[0] += FORGET_SECONDS + 1
    assert older.fit(status) == status

"""Operator and definition of different versions, on a real API server.

The definition of the next version is newer_version's; an older one is today's without some fields.
The API server of these tests publishes no OpenAPI for custom resources where it is joined of two;
there `published` stands in for it, made of the definition as kube-apiserver 1.27 and later do:
defaults and x-kubernetes-group-version-kind stand in the schema. A current server is asked itself.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import job_samples
import newer_version
from cluster.api import wait_for
from cluster.control_plane import ControlPlane
from newer_version import DEFAULT
from osft_operator import crd
from osft_operator.cluster import Cluster, NotFound
from osft_operator.kinds import OSFTJOBS, PYTORCHJOBS
from osft_operator.status import STARTING
from osft_operator.status_model import PHASES
from reconcile_scene import Scene

pytestmark = pytest.mark.cluster

Object = dict[str, Any]
Story = Callable[[Scene], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def newer_definition(tmp_path_factory: pytest.TempPathFactory) -> Object:
    sources = newer_version.make(tmp_path_factory.mktemp("newer"))
    program = "from osft_operator import crd; answer = crd.crd()"
    definition: Object = newer_version.ask(sources, program)
    return definition


@pytest.fixture
def restored(control_plane: ControlPlane) -> Iterator[None]:
    """Today's definition again at the end."""
    yield
    control_plane.install_crd(crd.crd())


def play(plane: ControlPlane, namespace: str, story: Story) -> None:
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("KUBECONFIG", str(plane.kubeconfig))
        cluster = Cluster.connect()

    async def whole() -> None:
        await story(Scene(cluster, namespace))

    try:
        asyncio.run(whole())
    finally:
        cluster.close()


def serve(plane: ControlPlane, namespace: str, definition: Object, field: str) -> None:
    """Install a definition and wait until it is in force: it has, or lacks, a field."""
    plane.install_crd(definition)
    path = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs?dryRun=All"
    spec = schema_of(definition)["properties"]["spec"]["properties"]["training"]["properties"]
    wanted = field in spec

    def in_force() -> bool:
        made = plane.api.post(path, job_samples.job(name="probe"))
        return (field in made["spec"]["training"]) is wanted

    wait_for("the definition", in_force)


def schema_of(definition: Object) -> Object:
    schema: Object = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def test_fields_that_a_newer_definition_fills_in_are_passed_over(
    control_plane: ControlPlane,
    namespace: str,
    newer_definition: Object,
    restored: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def published(*_: Any) -> Object:
        return schema_of(newer_definition)

    async def story(scene: Scene) -> None:
        await scene.cluster.create(OSFTJOBS, namespace, job_samples.job(name="run"))
        serve(control_plane, namespace, newer_definition, "futureKnob")
        assert (await scene.job())["spec"]["training"]["futureKnob"] == DEFAULT
        wish = job_samples.job({"spec.training.futureKnob": 0.9}, name="wish")
        await scene.cluster.create(OSFTJOBS, namespace, wish)
        try:
            await scene.cluster.schema(OSFTJOBS)
        except NotFound:
            monkeypatch.setattr(scene.cluster, "schema", published)
        await scene.settle("run")
        await scene.settle("wish")
        assert await scene.names(PYTORCHJOBS) == ["run"]
        wish = await scene.job("wish")
        (accepted,) = (c for c in wish["status"]["conditions"] if c["type"] == "Accepted")
        assert accepted["reason"] == "InvalidSpec"
        assert "spec.training.futureKnob: unknown field" in accepted["message"]
        assert "older than the OSFTJob's definition: upgrade it" in accepted["message"]

    play(control_plane, namespace, story)
    assert caplog.text.count("spec.training.futureKnob (0.5)") == 1


def test_a_status_that_an_older_definition_does_not_know_is_written_without_it(
    control_plane: ControlPlane, namespace: str, restored: None, caplog: pytest.LogCaptureFixture
) -> None:
    older = copy.deepcopy(crd.crd())
    status = schema_of(older)["properties"]["status"]["properties"]
    del status["restartsBeforeAttempt"], status["resolved"]["properties"]["runAsUser"]
    status["phase"]["enum"] = [phase for phase in PHASES if phase != "Starting"]
    # a mark by which to see that it is in force
    training = schema_of(older)["properties"]["spec"]["properties"]["training"]["properties"]
    training["pastKnob"] = {"type": "boolean", "default": False, "description": "x"}
    rules = schema_of(older).pop("x-kubernetes-validations")
    assert rules

    async def story(scene: Scene) -> None:
        await scene.cluster.create(OSFTJOBS, namespace, job_samples.job(name="run"))
        serve(control_plane, namespace, older, "pastKnob")

        async def published(*_: Any) -> Object:
            return schema_of(older)

        scene.cluster.schema = published  # type: ignore[method-assign]
        for _ in range(4):
            await scene.one_pass()
        assert await scene.names(PYTORCHJOBS) == ["run"]
        before = await scene.job()
        assert before["status"]["resolved"]["nnodes"] == 1
        assert not {"restartsBeforeAttempt", "phase"} & before["status"].keys()
        assert (await scene.condition("Running"))["reason"] in STARTING
        await scene.one_pass()
        assert await scene.job() == before

    play(control_plane, namespace, story)
    assert caplog.text.count("older than this operator: upgrade it; it lacks") >= 1
    assert "status.resolved.runAsUser, status.restartsBeforeAttempt" in caplog.text

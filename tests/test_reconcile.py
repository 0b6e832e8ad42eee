"""Passes over an OSFTJob against a real API server: what is made, written, said, and held back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import job_samples
from cluster.control_plane import ControlPlane
from osft_operator.actions import Decision, Event
from osft_operator.cluster import Cluster, Conflict, Refused
from osft_operator.events import Recorder
from osft_operator.kinds import CLAIMS, EVENTS, OSFTJOBS, PYTORCHJOBS, Kind
from osft_operator.merge_patch import merge_patch
from osft_operator.names import JOB_LABEL
from osft_operator.queue import Key
from osft_operator.reconcile import says_little
from osft_trainer.report import Progress
from reconcile_scene import Scene

Story = Callable[[Scene], Coroutine[Any, Any, None]]


@pytest.fixture
def tell(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Story], None]:
    """Runs a story in the test's namespace, where one OSFTJob `run` waits."""

    def play(story: Story) -> None:
        monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
        cluster = Cluster.connect()

        async def whole() -> None:
            await cluster.create(OSFTJOBS, namespace, job_samples.job(name="run"))
            await story(Scene(cluster, namespace))

        try:
            asyncio.run(whole())
        finally:
            cluster.close()

    return play


@pytest.mark.cluster
def test_children_are_made_and_then_nothing_is_written(tell: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.settle()
        assert await scene.names(PYTORCHJOBS) == ["run"]
        assert await scene.names(CLAIMS) == ["run-checkpoints"]
        before = await scene.job()
        assert before["status"]["phase"] == "Starting"
        await scene.one_pass()
        assert await scene.job() == before
        assert await scene.said() == {}

    tell(story)


@pytest.mark.cluster
def test_which_pytorchjob_was_made_is_known_before_it_is_written(
    tell: Callable[[Story], None],
) -> None:
    async def story(scene: Scene) -> None:
        await scene.settle()
        status = (await scene.job())["status"]
        assert "pyTorchJobUID" not in status, "worth no write of its own"
        uid = (await scene.cluster.get(PYTORCHJOBS, scene.namespace, "run"))["metadata"]["uid"]
        await scene.cluster.delete(PYTORCHJOBS, scene.namespace, "run", uid=uid)
        await scene.settle()
        status = (await scene.job())["status"]
        assert (status["restarts"], status["attempt"]) == (1, 2), "gone, and not made again as new"

    tell(story)


@pytest.mark.cluster
def test_a_slow_start_is_written_after_a_while(tell: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.settle()
        scene.now += 29
        assert await scene.one_pass() == 1
        assert (await scene.job())["status"]["reason"] == "Starting"
        scene.now += 1
        await scene.settle()
        status = (await scene.job())["status"]
        assert status["reason"] == "PodsStarting"
        assert "pyTorchJobUID" in status

    tell(story)


@pytest.mark.cluster
def test_a_stale_cache_makes_nothing_twice(tell: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        key = Key(scene.namespace, "run")
        await scene.one_pass()
        stale = scene.cache.get(OSFTJOBS, *key)
        assert stale is not None
        await scene.settle()
        scene.now += 60
        await scene.settle()
        made = [await scene.cluster.get(PYTORCHJOBS, scene.namespace, "run")]
        # As if this process had begun before its earlier life made the children.
        late = Scene(scene.cluster, scene.namespace)
        late._resync._synced = frozenset({PYTORCHJOBS, CLAIMS, OSFTJOBS})
        late.cache.put(OSFTJOBS, stale)
        assert await late.reconciler.reconcile(key) == 1.0
        assert await late.reconciler.reconcile(key) == 1.0
        with pytest.raises(Conflict):
            await late.reconciler.reconcile(key)
        await late.settle()
        assert [await scene.cluster.get(PYTORCHJOBS, scene.namespace, "run")] == made
        assert (await scene.job())["status"]["pyTorchJobUID"] == made[0]["metadata"]["uid"]

    tell(story)


@pytest.mark.cluster
def test_a_refusal_is_a_condition_with_the_servers_words_and_told_once(
    tell: Callable[[Story], None], control_plane: ControlPlane, namespace: str
) -> None:
    quotas = f"/api/v1/namespaces/{namespace}/resourcequotas"
    hard = {"persistentvolumeclaims": "0"}
    quota = {"metadata": {"name": "none"}, "spec": {"hard": hard}}
    control_plane.api.post(quotas, {"apiVersion": "v1", "kind": "ResourceQuota", **quota})
    # No controller counts here, so the test does.
    control_plane.api.patch(f"{quotas}/none/status", {"status": {"hard": hard, "used": hard}})

    async def story(scene: Scene) -> None:
        assert await scene.one_pass() == 0
        for _ in range(3):
            assert await scene.one_pass() == 30
        accepted = await scene.condition("Accepted")
        assert (accepted["status"], accepted["reason"]) == ("False", "Refused")
        assert "exceeded quota" in accepted["message"]
        assert await scene.names(PYTORCHJOBS) == []
        assert await scene.said() == {"Refused": 1}
        control_plane.api.delete(f"{quotas}/none")
        await scene.settle()
        assert await scene.names(PYTORCHJOBS) == ["run"]
        assert (await scene.condition("Accepted"))["status"] == "True"

    tell(story)


@pytest.mark.cluster
def test_the_author_is_told_of_a_bug_and_of_a_status_that_cannot_be_written(
    tell: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Decision:
        raise RecursionError("maximum recursion depth exceeded")

    def strange(*_: object) -> Decision:
        return Decision({"restarts": -1})

    async def story(scene: Scene) -> None:
        for _ in range(2):
            with pytest.raises(RecursionError):
                await scene.one_pass()
        accepted = await scene.condition("Accepted")
        assert (accepted["status"], accepted["reason"]) == ("False", "InternalError")
        assert "RecursionError: maximum recursion depth exceeded" in accepted["message"]
        assert (await scene.job())["status"]["phase"] == "Pending"
        assert await scene.said() == {"InternalError": 1}
        monkeypatch.setattr("osft_operator.reconcile.decide", strange)
        with pytest.raises(Refused, match="restarts"):
            await scene.one_pass()
        assert await scene.said() == {"InternalError": 1}
        monkeypatch.undo()
        await scene.settle()
        assert (await scene.condition("Accepted"))["status"] == "True"
        assert await scene.names(PYTORCHJOBS) == ["run"]
        events = (await scene.cluster.list_all(EVENTS, scene.namespace)).items
        assert any("does not take the job's status" in each["message"] for each in events)

    monkeypatch.setattr("osft_operator.reconcile.decide", broken)
    tell(story)


@pytest.mark.cluster
def test_what_was_decided_is_told_though_only_the_claim_could_be_made(
    tell: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(scene: Scene) -> None:
        create = scene.cluster.create

        async def refuse_pytorchjobs(kind: Kind, namespace: str, body: Any) -> Any:
            if kind is PYTORCHJOBS:
                raise Refused("422: no")
            return await create(kind, namespace, body)

        monkeypatch.setattr(scene.cluster, "create", refuse_pytorchjobs)
        job = (OSFTJOBS, scene.namespace, "run")
        await scene.one_pass()
        await scene.cluster.patch(*job, {"spec": {"suspend": True}})
        await scene.settle()
        await scene.cluster.patch(*job, {"spec": {"suspend": False}})
        for _ in range(3):
            assert await scene.one_pass() == 30
        assert await scene.names(CLAIMS) == ["run-checkpoints"]
        assert await scene.said() == {"SuspendRequested": 1, "Resumed": 1, "Refused": 1}

    tell(story)


@pytest.mark.cluster
def test_progress_is_held_back_but_not_a_milestone(tell: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.settle()
        uid = (await scene.job())["metadata"]["uid"]

        async def step_after(step: int, *, milestone: bool, seconds: float) -> int | None:
            scene.now += seconds
            scene.told.answer = Progress(run_id=uid, step=step, total_steps=1000, phase="Training")
            scene.reconciler.progressed(Key(scene.namespace, "run"), milestone)
            scene.waits = await scene.one_pass()
            progress = (await scene.job())["status"].get("progress") or {}
            found: int | None = progress.get("step")
            return found

        assert await step_after(1, milestone=True, seconds=0) == 1
        assert await step_after(2, milestone=False, seconds=10) == 1
        assert scene.waits == 20, "what was held back has an appointment"
        assert await step_after(3, milestone=True, seconds=1) == 3
        assert await step_after(4, milestone=False, seconds=29) == 3
        assert await step_after(5, milestone=False, seconds=2) == 5

    tell(story)


UNLABELLED = {"metadata": {"labels": {JOB_LABEL: None}}}
DISOWNED = {"metadata": {"ownerReferences": None}}


@pytest.mark.cluster
@pytest.mark.parametrize("change", [UNLABELLED, DISOWNED], ids=["label", "owner"])
def test_what_somebody_hid_is_not_taken_for_gone(
    tell: Callable[[Story], None], change: Any
) -> None:
    """An attempt whose label or owner was taken off runs on: its end is seen, none is beside it."""

    async def story(scene: Scene) -> None:
        await scene.settle()
        await scene.cluster.patch(PYTORCHJOBS, scene.namespace, "run", change)
        for _ in range(3):
            wait = await scene.one_pass()
        assert await scene.names(PYTORCHJOBS) == ["run"]
        assert (await scene.job())["status"]["restarts"] == 0
        assert wait is not None
        assert wait <= (10 if change is UNLABELLED else 60), "no watch tells of it"
        failed = {"conditions": [{"type": "Failed", "status": "True", "message": "told"}]}
        told = {"status": failed}
        await scene.cluster.patch(PYTORCHJOBS, scene.namespace, "run", told, sub="status")
        await scene.one_pass()
        assert (await scene.job())["status"]["attempt"] == 2
        assert (await scene.one_pass() == 10) == (change is UNLABELLED)
        for _ in range(200):
            if "run-a2" in await scene.names(PYTORCHJOBS):
                break
            await scene.one_pass()
            await asyncio.sleep(0.1)
        # the other one has ended, and is not ours to delete any more
        left = ["run-a2"] if change is UNLABELLED else ["run", "run-a2"]
        assert await scene.names(PYTORCHJOBS) == left

    tell(story)


@pytest.mark.cluster
def test_what_somebody_hid_is_stopped_when_the_job_has_failed(
    tell: Callable[[Story], None],
) -> None:
    async def story(scene: Scene) -> None:
        await scene.settle()
        deadline = {"spec": {"activeDeadlineSeconds": 1}}
        await scene.cluster.patch(OSFTJOBS, scene.namespace, "run", deadline)
        await scene.cluster.patch(PYTORCHJOBS, scene.namespace, "run", UNLABELLED)
        await asyncio.sleep(2)
        await scene.settle()
        assert (await scene.job())["status"]["reason"] == "DeadlineExceeded"
        left = await scene.cluster.list_all(PYTORCHJOBS, scene.namespace)
        assert all(body["metadata"].get("deletionTimestamp") for body in left.items)

    tell(story)


@pytest.mark.cluster
def test_an_event_that_comes_again_is_counted(tell: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        job = await scene.job()
        event = Event("Warning", "Again", "the same words")
        for recorder in (Recorder(scene.cluster, "a"), Recorder(scene.cluster, "b")):
            await recorder.record(job, event)
            await recorder.record(job, event)
        await recorder.record(job, Event("Warning", "Again2", "x" * 5000))
        assert await scene.said() == {"Again": 4, "Again2": 1}

    tell(story)


@pytest.mark.cluster
def test_a_job_that_is_gone_is_no_error(tell: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.settle()
        uid = (await scene.job())["metadata"]["uid"]
        await scene.cluster.delete(OSFTJOBS, scene.namespace, "run", uid=uid)
        assert await scene.one_pass() is None

    tell(story)


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({}, {}, {}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        ({"a": 1}, {}, {"a": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": [1, 2]}, {"a": [2]}, {"a": [2]}),
        ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": None}}),
    ],
)
def test_a_merge_patch_makes_the_new_of_the_old(
    old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]
) -> None:
    assert merge_patch(old, new) == patch


def test_words_and_progress_can_wait_but_nothing_else() -> None:
    before = {
        "phase": "Running",
        "progress": {"step": 1},
        "conditions": [{"type": "Running", "status": "False", "reason": "A", "message": "x"}],
    }

    def after(**changes: Any) -> dict[str, Any]:
        return {**before, **changes}

    condition = before["conditions"][0]
    assert says_little(before, after(progress={"step": 2}, countedPods={"newest": "t"}))
    assert says_little(before, after(conditions=[{**condition, "message": "y"}]))
    assert not says_little(before, after(conditions=[{**condition, "reason": "B"}]))
    starts = after(reason="Starting", conditions=[{**condition, "reason": "Starting"}])
    further = [{**condition, "reason": "PodsStarting"}]
    assert says_little(starts, after(reason="PodsStarting", conditions=further))
    assert not says_little(before, after(checkpoint={"latest": "c"}))
    assert not says_little(before, after(restarts=1))

"""What happens to jobs that are killed, deleted, changed, suspended or wrong: nothing is lost.

On the same parts as test_end_to_end.py. A job here takes a few steps only; that it learns is shown
there.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from cluster.api import wait_for
from operator_process import OperatorProcess
from osft_operator import process_tree
from osftjobs import Jobs, osftjob

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]


def short(name: str, *, spec: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """A job of some seconds that saves its state often."""
    quick = {"maxSteps": 40, "checkpointEverySteps": 5, "splitBy": None, "retentionTokens": None}
    return osftjob(name, spec=spec, **{**quick, **training})


def test_killed_master_resumes_to_the_same_losses(jobs: Jobs) -> None:
    """(b) SIGKILL to all of the master pod; the run equals an undisturbed one, loss by loss."""
    jobs.apply(short("undisturbed", spec={"nnodes": 2}))
    jobs.wait_phase("undisturbed", "Succeeded")
    jobs.apply(short("disturbed", spec={"nnodes": 2}))
    jobs.wait_step("disturbed", 12)
    process_tree.kill(jobs.cluster.kubelet.runner(jobs.namespace, "disturbed-master-0").at.mark)
    status = jobs.wait_phase("disturbed", "Succeeded")
    assert status["restarts"] >= 1
    assert jobs.losses("disturbed") == jobs.losses("undisturbed")


def test_killed_operator_loses_and_repeats_nothing(jobs: Jobs, operator: OperatorProcess) -> None:
    """(c) SIGKILL to the operator at several moments of a job's life."""
    operator.kill()
    jobs.apply(short("orphan"))
    operator.start()
    wait_for("the PyTorchJob", lambda: jobs.children("pytorchjobs"))
    operator.kill()
    uids = {child["metadata"]["uid"] for child in jobs.children("pytorchjobs")}
    operator.start()
    jobs.wait_step("orphan", 10)
    operator.kill()
    jobs.wait_step("orphan", 40)
    operator.start()
    status = jobs.wait_phase("orphan", "Succeeded")
    assert status.get("restarts", 0) == 0
    assert status["progress"]["step"] == 40
    assert {child["metadata"]["uid"] for child in jobs.children("pytorchjobs")} == uids
    claims = [claim["metadata"]["name"] for claim in jobs.children("persistentvolumeclaims")]
    assert sorted(claims) == ["datasets", "models", "orphan-checkpoints"]


@pytest.mark.parametrize("retain", [True, False])
def test_delete_while_it_runs_leaves_what_was_asked(jobs: Jobs, retain: bool) -> None:
    """(d) No process and no object is left; the claim stays if it is to be retained."""
    name = "kept" if retain else "gone"
    storage = short(name)["spec"]["storage"]
    storage["checkpoints"]["retain"] = retain
    spec = {"storage": storage, "terminationGracePeriodSeconds": 60}
    jobs.apply(short(name, spec=spec, maxSteps=1000, checkpointEverySteps=None))
    if retain:
        jobs.wait_step(name, 3)
    else:  # another moment: before the first step
        jobs.wait_phase(name, "Running")
    mark = jobs.cluster.kubelet.runner(jobs.namespace, f"{name}-master-0").at.mark
    assert process_tree.find(mark)
    jobs.kubectl("delete", "osftjob", name)
    wait_for("pods gone", lambda: not jobs.children("pods"), timeout_seconds=120)
    wait_for("PyTorchJob gone", lambda: not jobs.children("pytorchjobs"))
    wait_for("services gone", lambda: not jobs.children("services"))
    assert not process_tree.find(mark)

    def claims() -> set[str]:
        return {claim["metadata"]["name"] for claim in jobs.children("persistentvolumeclaims")}

    if retain:
        assert f"{name}-checkpoints" in claims()
        assert jobs.folder(name).complete_checkpoints(), "SIGTERM saved the state"
    else:
        wait_for("claim gone", lambda: f"{name}-checkpoints" not in claims())


def test_the_next_attempt_waits_for_the_save_of_the_one_before(jobs: Jobs) -> None:
    """(d) A PyTorchJob is deleted, and an OSFTJob is deleted and applied: no save is lost.

    The pod that ends is held still, as if its save took long.
    """
    spec = {"terminationGracePeriodSeconds": 60}
    job = short("saves", maxSteps=200, checkpointEverySteps=None, spec=spec)
    jobs.apply(job)

    def delete_pytorch_job() -> None:
        jobs.kubectl("delete", "pytorchjob", "saves", "--wait=false")

    def delete_and_apply() -> None:
        jobs.kubectl("delete", "osftjob", "saves")
        jobs.apply(job)

    saved = 0
    for pod, act in (
        ("saves-master-0", delete_pytorch_job),
        ("saves-a2-master-0", delete_and_apply),
    ):
        jobs.wait_step("saves", saved + 8)
        processes = process_tree.find(jobs.cluster.kubelet.runner(jobs.namespace, pod).at.mark)
        _send(processes, signal.SIGSTOP)
        act()
        wait_for("the wait", lambda: jobs.status("saves").get("reason") == "PodsStopping")
        assert jobs.status("saves")["waitingFor"]["name"] == pod
        wait_for("no PyTorchJob", lambda: not jobs.children("pytorchjobs"))
        time.sleep(1.5)
        assert not jobs.children("pytorchjobs"), "the next one is not made beside the old pod"
        _send(processes, signal.SIGCONT)
        wait_for("the next attempt", lambda: jobs.children("pytorchjobs"), timeout_seconds=90)
        newest = jobs.folder("saves").complete_checkpoints()[-1]
        step = jobs.folder("saves").step_of(newest) or 0
        assert step >= saved + 8, "what it saved while it ended is kept"
        saved = step
    jobs.wait_step("saves", saved + 1)


def _send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        os.kill(process, number)


def test_a_job_on_the_old_claim_is_taken_for_what_it_is(jobs: Jobs) -> None:
    """(d) Delete and apply again: the same is done at once, another is refused or begins anew.

    Beside some of them lives a container that does not end by itself.
    """
    proxy = {"name": "proxy", "image": "proxy:1", "command": ["sleep", "600"]}
    beside = {"podTemplate": {"spec": {"containers": [proxy]}}}
    jobs.apply(short("again", maxSteps=5, spec=beside))
    jobs.wait_phase("again", "Succeeded")
    wait_for("its pods end", lambda: not _pods_of(jobs, "again"))
    first, written = jobs.losses("again"), jobs.folder("again").metrics.read_bytes()
    jobs.kubectl("delete", "osftjob", "again")
    jobs.apply(short("again", maxSteps=5))
    jobs.wait_phase("again", "Succeeded")
    assert jobs.folder("again").metrics.read_bytes() == written, "what is done is not done twice"
    jobs.kubectl("delete", "osftjob", "again")
    changed = short("again", maxSteps=5, learningRate=0.0005, spec=beside)
    jobs.apply(changed)
    status = jobs.wait_phase("again", "Failed")
    assert "learning_rate" in status["failure"]["message"]
    assert status["failure"]["exitCode"] == 2
    wait_for("its pods end", lambda: not _pods_of(jobs, "again"))
    jobs.kubectl("delete", "osftjob", "again")
    changed["spec"] |= {"onExistingRun": "restart", "podTemplate": {}}
    jobs.apply(changed)
    jobs.wait_phase("again", "Succeeded")
    assert len(jobs.losses("again")) == 5
    assert jobs.losses("again") != first
    assert (jobs.folder("again").previous(1) / "final").is_dir()


def test_suspend_and_resume(jobs: Jobs) -> None:
    """(f) Suspended: no pods, state saved. Resumed: the losses of an undisturbed run."""
    jobs.apply(short("calm", maxSteps=100))
    jobs.wait_phase("calm", "Succeeded")
    jobs.apply(short("pause", maxSteps=100, checkpointEverySteps=None))
    jobs.wait_step("pause", 8)
    patch = '{"spec": {"suspend": true}}'
    jobs.kubectl("patch", "osftjob", "pause", "--type=merge", "-p", patch)
    jobs.wait_phase("pause", "Suspended")
    wait_for("pods gone", lambda: not _pods_of(jobs, "pause"), timeout_seconds=90)
    assert jobs.folder("pause").complete_checkpoints()
    assert len(jobs.losses("pause")) < 100
    jobs.kubectl("patch", "osftjob", "pause", "--type=merge", "-p", patch.replace("true", "false"))
    jobs.wait_phase("pause", "Succeeded")
    assert jobs.losses("pause") == jobs.losses("calm")


def _pods_of(jobs: Jobs, name: str) -> list[str]:
    names = [pod["metadata"]["name"] for pod in jobs.children("pods")]
    return [each for each in names if each.startswith(name)]


def _without(job: dict[str, Any], *path: str) -> dict[str, Any]:
    part = job
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return job


REFUSED_BY_THE_SERVER = [
    (short("bad", unfreezeRankRatio=1.5), "unfreezeRankRatio"),
    (short("bad", learningRate=-1), "learningRate"),
    (short("bad", lerningRate=1e-5), "lerningRate"),
    (short("bad", maxSeqLen=5000), "maxSeqLen"),
    (short("bad", maxSteps=None), "maxSteps"),
    (short("bad", ckptOutputDir="/elsewhere"), "ckptOutputDir"),
    (_without(short("bad"), "spec", "training", "modelPath"), "modelPath"),
    (short("a" * 47), "name"),
    (short("bad", spec={"nnodes": 0}), "nnodes"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED_BY_THE_SERVER, ids=lambda item: str(item)[:20])
def test_bad_spec_is_refused_with_the_field(jobs: Jobs, body: dict[str, Any], field: str) -> None:
    """(e) What the schema can see never becomes an object."""
    answer = jobs.apply(body, check=False)
    assert field in answer
    assert not jobs.children("osftjobs")


def test_bad_spec_that_only_the_operator_sees_is_a_condition(jobs: Jobs) -> None:
    """(e) Refused by policy: Accepted=False with the field, and the operator goes on."""
    pod = {"spec": {"containers": [{"name": "pytorch", "securityContext": {"privileged": True}}]}}
    jobs.apply(short("forbidden", spec={"podTemplate": pod}), check=False)
    if jobs.get("forbidden"):  # else the schema had no place for it
        accepted = wait_for("a verdict", lambda: _condition(jobs, "forbidden", "Accepted"))
        assert accepted["status"] == "False"
        assert "podTemplate" in accepted["message"]
    jobs.apply(short("fine", spec={"suspend": True}))
    jobs.wait_phase("fine", "Suspended")


def test_bad_data_fails_with_pod_exit_code_and_line(jobs: Jobs) -> None:
    """(e) What only the trainer sees: final, never retried, in the trainer's own words."""
    (jobs.claim("datasets") / "broken.jsonl").write_text('{"messages": []}\nnot json\n')
    jobs.apply(short("broken", dataPath="/data/broken.jsonl"))
    status = jobs.wait_phase("broken", "Failed")
    failure = status["failure"]
    assert failure["pod"] == "broken-master-0"
    assert failure["container"] == "pytorch"
    assert failure["exitCode"] == 2
    assert "broken.jsonl" in failure["message"]
    assert status.get("restarts", 0) == 0
    failed = _condition(jobs, "broken", "Failed")
    assert failed["status"] == "True"
    wait_for("PyTorchJob gone", lambda: not jobs.children("pytorchjobs"))


def _condition(jobs: Jobs, name: str, kind: str) -> dict[str, Any]:
    found = [each for each in jobs.status(name).get("conditions", []) if each["type"] == kind]
    return found[0] if found else {}

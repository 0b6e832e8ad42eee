"""PyTorchJobs run for real: the stand-in training-operator makes pods, the kubelet runs them."""

import asyncio
import contextlib
import datetime
from collections.abc import Callable

import pytest

import job_samples
from cluster.api import ApiError, wait_for
from cluster.fixtures import Cluster
from cluster.jobs import JOBS, conditions, pytorchjob
from osft_operator import process_tree
from osft_operator.cluster import Cluster as OwnCluster
from osft_operator.kinds import OSFTJOBS
from reconcile_scene import Scene

pytestmark = pytest.mark.cluster

ALL_REDUCE = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(x)
n = dist.get_world_size()
assert x.item() == n * (n + 1) / 2, x
sys.stdout.write(f"sum {int(x.item())} of {n}\\n")  # at once: two ranks share the log
dist.destroy_process_group()
"""


@pytest.fixture
def submit(cluster: Cluster, namespace: str) -> Callable[[dict], Callable[[], dict]]:
    """Creates a PyTorchJob; gives a function that reads it."""
    api, path = cluster.plane.api, JOBS.format(namespace=namespace)

    def create(job: dict) -> Callable[[], dict]:
        api.post(path, job)
        return lambda: api.get(f"{path}/{job['metadata']['name']}")

    return create


def pods_of(cluster: Cluster, namespace: str) -> dict[str, dict]:
    found = cluster.plane.api.get(f"/api/v1/namespaces/{namespace}/pods")["items"]
    return {pod["metadata"]["name"]: pod for pod in found}


def wait_for_condition(read: Callable[[], dict], kind: str, seconds: float = 60) -> dict:
    def reached() -> dict | None:
        job = read()
        return job if conditions(job).get(kind) == "True" else None

    return wait_for(f"condition {kind}", reached, timeout_seconds=seconds)


def test_a_job_is_created_runs_and_succeeds(cluster, namespace, submit, tmp_path) -> None:
    gate = tmp_path / "gate"
    wait = (
        "import os, time; print('hello from', os.environ['RANK'], flush=True)\n"
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.05)"
    )
    read = submit(pytorchjob("ok", ["python", "-c", wait], workers=1))
    running = wait_for_condition(read, "Running")
    gate.touch()
    assert list(conditions(running))[:2] == ["Created", "Running"]
    services = cluster.plane.api.get(f"/api/v1/namespaces/{namespace}/services")["items"]
    assert {each["metadata"]["name"] for each in services} == {"ok-master-0", "ok-worker-0"}

    done = wait_for_condition(read, "Succeeded")
    assert conditions(done) == {"Created": "True", "Running": "False", "Succeeded": "True"}
    reasons = [each["reason"] for each in done["status"]["conditions"]]
    assert reasons == ["PyTorchJobCreated", "PyTorchJobRunning", "PyTorchJobSucceeded"]
    assert done["status"]["completionTime"] >= done["status"]["startTime"]
    assert done["status"]["replicaStatuses"]["Master"]["succeeded"] == 1
    assert "hello from 0" in cluster.plane.kubectl("-n", namespace, "logs", "ok-master-0")
    assert "Succeeded" in cluster.plane.kubectl("-n", namespace, "get", "pytorchjob", "ok")


def test_never_fails_the_job_at_once(cluster, namespace, submit) -> None:
    read = submit(pytorchjob("bad", ["sh", "-c", "exit 3"], restart_policy="Never"))
    failed = wait_for_condition(read, "Failed")
    last = failed["status"]["conditions"][-1]
    assert last["reason"] == "PyTorchJobFailed"
    assert "because 1 Master replica(s) failed" in last["message"]
    pod = pods_of(cluster, namespace)["bad-master-0"]
    assert pod["status"]["phase"] == "Failed"
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3


def test_exit_code_policy_tells_permanent_from_retryable(cluster, namespace, submit) -> None:
    read = submit(pytorchjob("user", ["sh", "-c", "exit 2"], restart_policy="ExitCode"))
    failed = wait_for_condition(read, "Failed")
    assert 'because "Master" replica(s) failed' in failed["status"]["conditions"][-1]["message"]
    assert "completionTime" not in failed["status"]

    submit(pytorchjob("again", ["sh", "-c", "exit 137"], restart_policy="ExitCode"))
    first = wait_for("first pod", lambda: pods_of(cluster, namespace).get("again-master-0"))

    def another() -> bool:
        now = pods_of(cluster, namespace).get("again-master-0")
        return bool(now) and now["metadata"]["uid"] != first["metadata"]["uid"]

    wait_for("second pod", another)


def test_on_failure_restarts_in_place_up_to_the_backoff_limit(cluster, namespace, submit) -> None:
    # the pod must be Running when its restarts are counted, so each attempt lasts a little
    command = ["sh", "-c", "echo attempt; sleep 0.7; exit 7"]
    read = submit(pytorchjob("loop", command, runPolicy={"backoffLimit": 2}))
    failed = wait_for_condition(read, "Failed")
    assert "reached the specified backoff limit" in failed["status"]["conditions"][-1]["message"]
    status = pods_of(cluster, namespace)["loop-master-0"]["status"]["containerStatuses"][0]
    assert status["restartCount"] >= 2
    assert status["lastState"]["terminated"]["exitCode"] == 7


def test_suspend_deletes_the_pods_and_resume_makes_new_ones(cluster, namespace, submit) -> None:
    read = submit(pytorchjob("pause", ["sleep", "600"], workers=1))
    wait_for_condition(read, "Running")
    path = JOBS.format(namespace=namespace) + "/pause"
    cluster.plane.api.patch(path, {"spec": {"runPolicy": {"suspend": True}}})
    suspended = wait_for_condition(read, "Suspended")
    assert conditions(suspended)["Running"] == "False"
    wait_for("no pods", lambda: not pods_of(cluster, namespace), timeout_seconds=20)
    cluster.plane.api.patch(path, {"spec": {"runPolicy": {"suspend": False}}})
    resumed = wait_for_condition(read, "Running")
    assert conditions(resumed)["Suspended"] == "False"
    cluster.plane.api.delete(path)


def test_a_suspended_job_makes_no_pods(cluster, namespace, submit) -> None:
    read = submit(pytorchjob("held", ["true"], runPolicy={"suspend": True}))
    wait_for_condition(read, "Suspended")
    assert pods_of(cluster, namespace) == {}


def test_a_refused_pod_is_told_once(cluster, namespace, submit) -> None:
    # a volume mount without its volume: the CRD lets templates pass, the API server no pod
    job = pytorchjob("refused", ["true"])
    spec = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    spec["containers"][0]["volumeMounts"] = [{"name": "none", "mountPath": "/x"}]
    submit(job)
    path = f"/api/v1/namespaces/{namespace}/events"

    def told() -> list[str]:
        events = cluster.plane.api.get(path)["items"]
        return [each["message"] for each in events if each["reason"] == "FailedCreatePod"]

    wait_for("event", told)
    with pytest.raises(TimeoutError):
        wait_for("second event", lambda: len(told()) > 1, timeout_seconds=2)
    assert "volumeMounts[0].name" in told()[0]


def test_an_evicted_pod_is_deleted_at_once_and_made_again(cluster, namespace, submit) -> None:
    read = submit(pytorchjob("lost", ["sleep", "600"]))
    wait_for_condition(read, "Running")
    api, path = cluster.plane.api, f"/api/v1/namespaces/{namespace}/pods/lost-master-0"
    first = pods_of(cluster, namespace)["lost-master-0"]["metadata"]["uid"]
    status = {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    api.patch(f"{path}/status", {"status": status})

    def made_again() -> bool:
        pod = pods_of(cluster, namespace).get("lost-master-0")
        return pod is not None and pod["metadata"]["uid"] != first

    wait_for("another pod", made_again, timeout_seconds=10)
    said = {each["reason"]: each for each in events_of(cluster, namespace)}
    assert said["PyTorchJobRestarting"]["type"] == "Warning"


def events_of(cluster: Cluster, namespace: str) -> list[dict]:
    items: list[dict] = cluster.plane.api.get(f"/api/v1/namespaces/{namespace}/events")["items"]
    return items


def only_one_pod(cluster: Cluster, namespace: str) -> None:
    """A quota, with what its controller would write: there is none here."""
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    metadata, hard = {"name": "one-pod", "namespace": namespace}, {"pods": "1"}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata}
    body |= {"spec": {"hard": hard}}
    with contextlib.suppress(ApiError):
        cluster.plane.api.post(path, body)
    change = {"status": {"hard": hard, "used": {"pods": "0"}}}
    cluster.plane.api.patch(f"{path}/one-pod/status", change)


def test_one_refused_pod_of_two_is_explained_by_the_operator(
    cluster, namespace, monkeypatch
) -> None:
    """Also after a resume, when each try that fails says in the same second that it resumes."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.plane.kubeconfig))
    body = job_samples.job({"spec.nnodes": 2, "spec.schedulerName": "nobody"}, name="run")

    async def story(connection: OwnCluster) -> None:
        await connection.create(OSFTJOBS, namespace, body)
        scene = Scene(connection, namespace)
        await scene.settle()
        await _suspend(scene, True)
        await asyncio.to_thread(wait_for, "a suspension", lambda: told("PyTorchJobSuspended"))
        await asyncio.to_thread(wait_for, "no pods", lambda: not pods_of(cluster, namespace))
        await asyncio.to_thread(only_one_pod, cluster, namespace)
        await _suspend(scene, False)
        await asyncio.to_thread(wait_for, "tries", lambda: told("PyTorchJobResumed") > 2)
        await scene.settle()
        before = await scene.condition("Running")
        assert before["reason"] == "PodsStarting"
        later = datetime.timedelta(seconds=61)
        scene.reconciler._now = lambda: datetime.datetime.now(datetime.UTC) + later
        await scene.settle()
        running = await scene.condition("Running")
        assert running["reason"] == "PodsNotCreated"
        assert running["message"].startswith(
            "1 of 2 pods are made: FailedCreatePod: Error creating"
        )
        assert "exceeded quota: one-pod, requested: pods=1" in running["message"]
        assert "have the ResourceQuota raised" in running["message"]

    async def _suspend(scene: Scene, value: bool) -> None:
        await scene.cluster.patch(OSFTJOBS, namespace, "run", {"spec": {"suspend": value}})
        await scene.settle()

    def told(reason: str) -> int:
        found = events_of(cluster, namespace)
        return sum(each["count"] for each in found if each["reason"] == reason)

    connection = OwnCluster.connect()
    try:
        asyncio.run(story(connection))
    finally:
        connection.close()


def test_clean_pod_policy_running_ends_the_worker_that_is_left(cluster, namespace, submit) -> None:
    script = "import os, time; time.sleep(600 if os.environ['RANK'] == '1' else 1)"
    policy = {"cleanPodPolicy": "Running"}
    read = submit(pytorchjob("rest", ["python", "-c", script], workers=1, runPolicy=policy))
    wait_for_condition(read, "Succeeded")
    wait_for("worker gone", lambda: set(pods_of(cluster, namespace)) == {"rest-master-0"})


def test_a_job_goes_after_its_ttl(cluster, namespace, submit) -> None:
    policy = {"ttlSecondsAfterFinished": 1}
    read = submit(pytorchjob("short", ["true"], runPolicy=policy))

    def gone() -> bool:
        try:
            read()
        except ApiError as error:
            return error.code == 404
        return False

    wait_for("deleted job", gone, timeout_seconds=30)


def test_deleting_a_job_leaves_no_process(cluster, namespace, submit) -> None:
    # a child in a session of its own that ignores SIGTERM: what torchrun's ranks can look like
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    parent = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True);"
        "time.sleep(600)"
    )
    read = submit(pytorchjob("gone", ["python", "-c", parent], grace_seconds=1))
    wait_for_condition(read, "Running")
    uid = pods_of(cluster, namespace)["gone-master-0"]["metadata"]["uid"]
    mark = f"{cluster.mark}/pods/{uid}"
    wait_for("parent and child", lambda: len(process_tree.find(mark)) == 2)
    cluster.plane.api.delete(JOBS.format(namespace=namespace) + "/gone")
    wait_for("no pods", lambda: not pods_of(cluster, namespace), timeout_seconds=60)
    assert process_tree.find(mark) == []


@pytest.mark.parametrize("shape", ["static", "c10d"])
def test_two_pods_run_torchrun_together(cluster, namespace, submit, tmp_path, shape) -> None:
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    command = ["torchrun", str(script)]
    if shape == "static":
        job = pytorchjob("sum", command, workers=1, nproc_per_node="2")
    else:
        policy = {"rdzvBackend": "c10d", "rdzvId": "sum", "minReplicas": 2, "maxReplicas": 2}
        job = pytorchjob(
            "sum", command, workers=2, master=False, nproc_per_node="2", elasticPolicy=policy
        )
    read = submit(job)
    done = wait_for_condition(read, "Succeeded", seconds=120)
    assert conditions(done)["Running"] == "False"
    first = "sum-master-0" if shape == "static" else "sum-worker-0"
    assert "sum 10 of 4" in cluster.plane.kubectl("-n", namespace, "logs", first)


def test_two_jobs_on_the_same_port_do_not_meet(cluster, namespace, submit, tmp_path) -> None:
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    readers = [
        submit(pytorchjob(name, ["torchrun", str(script)], workers=1)) for name in ("one", "two")
    ]
    for name, read in zip(("one", "two"), readers, strict=True):
        wait_for_condition(read, "Succeeded", seconds=120)
        assert "sum 3 of 2" in cluster.plane.kubectl("-n", namespace, "logs", f"{name}-master-0")

"""A PyTorchJob expands into the pods that the training-operator makes, name by name."""

import copy

import kubernetes_validate
import pytest

from cluster.jobs import pytorchjob
from osft_operator import local_pods

LABEL = "training.kubeflow.org/"


def environment(pod: dict, container: int = 0) -> list[tuple[str, str]]:
    return [(each["name"], each["value"]) for each in pod["spec"]["containers"][container]["env"]]


def names(objects: list[dict]) -> list[str]:
    return [each["metadata"]["name"] for each in objects]


def test_master_comes_first_then_the_workers_by_index() -> None:
    job = pytorchjob("run", ["x"], workers=2)
    expected = ["run-master-0", "run-worker-0", "run-worker-1"]
    assert names(local_pods.pods(job)) == expected
    assert names(local_pods.services(job)) == expected


def test_static_environment_is_appended_in_the_controllers_order() -> None:
    job = pytorchjob("run", ["x"], workers=2, nproc_per_node="4")
    trainer = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    trainer["env"] = [{"name": "RANK", "value": "mine"}]
    assert environment(local_pods.pods(job)[2]) == [
        ("RANK", "mine"),
        ("PYTHONUNBUFFERED", "1"),
        ("MASTER_PORT", "23456"),
        ("PET_MASTER_PORT", "23456"),
        ("MASTER_ADDR", "run-master-0"),
        ("PET_MASTER_ADDR", "run-master-0"),
        ("WORLD_SIZE", "12"),
        ("RANK", "2"),
        ("PET_NODE_RANK", "2"),
        ("PET_NPROC_PER_NODE", "4"),
        ("PET_NNODES", "3"),
    ]


def test_elastic_environment_is_appended_in_the_controllers_order() -> None:
    policy = {
        "rdzvId": "an-id",
        "rdzvConf": [{"key": "timeout", "value": "9"}, {"key": "a", "value": "b"}],
        "minReplicas": 3,
        "maxRestarts": 5,
    }
    job = pytorchjob("run", ["x"], workers=3, master=False, elasticPolicy=policy)
    assert environment(local_pods.pods(job)[0]) == [
        ("PYTHONUNBUFFERED", "1"),
        ("PET_NPROC_PER_NODE", "1"),
        ("PET_RDZV_ENDPOINT", "run-worker-0:23456"),
        ("PET_RDZV_BACKEND", "c10d"),
        ("PET_NNODES", "3:3"),
        ("PET_MAX_RESTARTS", "5"),
        ("PET_RDZV_ID", "an-id"),
        ("PET_RDZV_CONF", "timeout=9,a=b"),
    ]


def test_elastic_bounds_default_to_the_workers_without_the_master() -> None:
    job = pytorchjob("run", ["x"], workers=3, elasticPolicy={"nProcPerNode": 2})
    del job["spec"]["nprocPerNode"]
    worker = dict(environment(local_pods.pods(job)[1]))
    assert worker["PET_NNODES"] == "3:3"
    assert worker["PET_NPROC_PER_NODE"] == "2"
    assert worker["PET_MASTER_ADDR"] == "run-master-0"


def test_workers_alone_get_neither_address_nor_rank() -> None:
    pod = local_pods.pods(pytorchjob("run", ["x"], workers=2, master=False))[1]
    assert [name for name, _ in environment(pod)] == [
        "PYTHONUNBUFFERED",
        "PET_NPROC_PER_NODE",
        "PET_NNODES",
    ]
    assert "initContainers" not in pod["spec"]


def test_auto_counts_as_one_process_per_node() -> None:
    job = pytorchjob("run", ["x"], workers=1, nproc_per_node="auto")
    values = dict(environment(local_pods.pods(job)[0]))
    assert (values["WORLD_SIZE"], values["PET_NPROC_PER_NODE"]) == ("2", "auto")


@pytest.mark.parametrize(
    ("master", "index", "role"), [(True, 0, "master"), (True, 1, None), (False, 0, "master")]
)
def test_labels_say_job_type_index_and_role(master: bool, index: int, role: str | None) -> None:
    pod = local_pods.pods(pytorchjob("run", ["x"], workers=2, master=master))[index]
    labels = pod["metadata"]["labels"]
    kind = "master" if master and index == 0 else "worker"
    assert labels[LABEL + "operator-name"] == "pytorchjob-controller"
    assert labels[LABEL + "job-name"] == "run"
    assert labels[LABEL + "replica-type"] == kind
    assert labels[LABEL + "replica-index"] == "0"
    assert labels.get(LABEL + "job-role") == role


def test_only_the_templates_metadata_reaches_the_pods() -> None:
    job = pytorchjob("run", ["x"])
    job["metadata"] |= {"labels": {"job": "only"}, "namespace": "n", "uid": "u"}
    template = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    template["metadata"] = {
        "name": "overwritten",
        "labels": {"a": "b", LABEL + "job-name": "forged"},
        "annotations": {"c": "d"},
    }
    metadata = local_pods.pods(job)[0]["metadata"]
    assert metadata["name"] == "run-master-0"
    assert metadata["namespace"] == "n"
    assert metadata["labels"]["a"] == "b"
    assert metadata["labels"][LABEL + "job-name"] == "run"
    assert "job" not in metadata["labels"]
    assert metadata["annotations"] == {"c": "d"}
    assert metadata["ownerReferences"] == [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "name": "run",
            "uid": "u",
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("OnFailure", "OnFailure"), ("Always", "Always"), ("Never", "Never"), ("ExitCode", "Never")],
)
def test_restart_policy_of_the_pod(policy: str, expected: str) -> None:
    job = pytorchjob("run", ["x"], restart_policy=policy)
    assert local_pods.pods(job)[0]["spec"]["restartPolicy"] == expected


def test_every_container_gets_the_environment_and_init_containers_none() -> None:
    job = pytorchjob("run", ["x"], workers=1)
    spec = copy.deepcopy(job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"])
    spec["containers"].append({"name": "side", "image": "i"})
    spec["initContainers"] = [{"name": "fetch", "image": "i"}]
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] = {"spec": spec}
    pod = local_pods.pods(job)[1]
    assert environment(pod, 0) == environment(pod, 1)
    init = pod["spec"]["initContainers"]
    assert [each["name"] for each in init] == ["fetch", "init-pytorch"]
    assert not any("env" in each for each in init)
    assert "nslookup run-master-0" in init[1]["command"][2]


def test_services_carry_all_ports_and_the_port_of_the_job() -> None:
    job = pytorchjob("run", ["x"])
    trainer = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    trainer["ports"] = [{"name": "metrics", "containerPort": 28080}]
    service = local_pods.services(job)[0]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["ports"] == [
        {"name": "metrics", "port": 28080},
        {"name": "pytorchjob-port", "port": 23456},
    ]
    assert LABEL + "job-role" not in service["spec"]["selector"]
    trainer["ports"] = [{"name": "pytorchjob-port", "containerPort": 3000}]
    assert dict(environment(local_pods.pods(job)[0]))["PET_MASTER_PORT"] == "3000"


def test_the_job_itself_is_not_changed() -> None:
    job = pytorchjob("run", ["x"], workers=1)
    before = copy.deepcopy(job)
    local_pods.pods(job)
    local_pods.services(job)
    assert job == before


def test_a_job_without_the_trainers_container_is_refused() -> None:
    job = pytorchjob("run", ["x"])
    job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["name"] = "a"
    with pytest.raises(ValueError, match="no container is named 'pytorch'"):
        local_pods.pods(job)


def test_pods_and_services_are_valid_for_kubernetes() -> None:
    job = pytorchjob("run", ["x"], workers=1)
    for each in [*local_pods.pods(job), *local_pods.services(job)]:
        kubernetes_validate.validate(each, "1.31", strict=True)

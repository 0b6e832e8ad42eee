"""The outputs on the page for those who run the operator, from a cluster on which they happen.

`make page` writes them. The operator is a process here and no pod: its log and its metrics are read
from the process, and stand on the page under the command that reads those of a pod.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pretrain
import pytest

import operators_page
from cluster.api import wait_for
from cluster.fixtures import Cluster
from end_to_end_fixtures import SYSTEM
from operator_process import OperatorProcess
from osftjobs import OLD, Jobs, osftjob

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]
TEAM = "team"


@pytest.fixture(scope="module")
def team(
    cluster: Cluster, operator: OperatorProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    """A namespace with a name that can stand on the page, and a model that has learned nothing."""
    model = tmp_path_factory.mktemp("untrained") / "skills"
    pretrain.pretrain(model, [OLD], steps=1)
    cluster.plane.create_namespace(TEAM)
    jobs = Jobs(cluster, TEAM)
    jobs.provide(model)
    yield jobs
    jobs.kubectl("delete", "osftjobs", "--all")
    cluster.plane.delete_namespace(TEAM)


def events_of(team: Jobs, name: str) -> operators_page.Said:
    command = f"get events --field-selector involvedObject.name={name} --sort-by .firstTimestamp"
    columns = "custom-columns=COUNT:.count,TYPE:.type,REASON:.reason,MESSAGE:.message"
    printed = team.kubectl(*command.split(), "-o", columns)
    return f"kubectl -n {TEAM} {command} -o {columns}", as_pods_see_it(team, printed)


def osft(team: Jobs, *arguments: str) -> operators_page.Said:
    environment = {**os.environ, "KUBECONFIG": str(team.cluster.plane.kubeconfig)}
    command = [Path(sys.executable).with_name("osft"), *arguments, "-n", TEAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    printed = as_pods_see_it(team, done.stdout + done.stderr)
    return f"osft {' '.join(arguments)} -n {TEAM}", printed


def as_pods_see_it(team: Jobs, text: str) -> str:
    """Paths as in a container: pods are processes here, and a claim is a folder of this machine."""
    for name in ("tone", "deleted"):
        text = text.replace(str(team.claim(f"{name}-checkpoints")), "/checkpoints")
    return text


def test_what_a_run_shows(team: Jobs, operator: OperatorProcess) -> None:
    team.apply(osftjob("tone", splitBy=None, retentionTokens=None, maxSteps=20))
    operators_page.record("watch", osft(team, "watch", "tone"), only_the_end=True)
    operators_page.record("logs", osft(team, "logs", "tone", "--tail", "4"), only_the_end=True)
    team.wait_phase("tone", "Succeeded")
    wait_for("its last event", lambda: "Done" in events_of(team, "tone")[1])
    listed = ("kubectl -n team get osftjob tone", team.kubectl("get", "osftjob", "tone"))
    operators_page.record("run", listed, events_of(team, "tone"))

    about = [line for line in operator.log().splitlines() if '"osftjob": "team/tone"' in line]
    command = f"kubectl -n {SYSTEM} logs deployment/osft-{SYSTEM} | grep team/tone"
    said = (command, as_pods_see_it(team, "\n".join(about)))
    operators_page.record("log", said, only_the_end=True)

    port = operator.environment["OSFT_METRICS_PORT"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        told = answer.read().decode().splitlines()
    wanted = ("leader_election_master_status{", "osft_operator_build_info{",
              "osftjob_start_seconds_count", "controller_runtime_reconcile_total{")  # fmt: skip
    seen = "\n".join(line for line in told if line.startswith(wanted))
    pattern = "|".join(each.rstrip("{") for each in wanted)
    command = f"curl -s http://osft-{SYSTEM}-metrics.{SYSTEM}:8080/metrics | grep -E '^({pattern})'"
    operators_page.record("metrics", (command, seen))


def test_what_is_refused_shows_why(team: Jobs) -> None:
    pod = {"hostNetwork": True, "serviceAccountName": "builder"}
    team.apply(osftjob("greedy", spec={"podTemplate": {"spec": pod}}))
    wait_for("the refusal", lambda: "Denied" in events_of(team, "greedy")[1])
    listed = ("kubectl -n team get osftjob greedy", team.kubectl("get", "osftjob", "greedy"))
    operators_page.record("refusal", listed, events_of(team, "greedy"))


def test_what_happens_when_somebody_takes_a_name_or_a_pytorchjob_away(team: Jobs) -> None:
    body = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "taken"},
        "spec": {
            "runPolicy": {"suspend": True},
            "pytorchReplicaSpecs": {
                "Master": {
                    "replicas": 1,
                    "template": {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}},
                }
            },
        },
    }
    team.api.post(f"/apis/kubeflow.org/v1/namespaces/{TEAM}/pytorchjobs", body)
    team.apply(osftjob("taken"))
    wait_for("the refusal", lambda: "NameTaken" in events_of(team, "taken")[1])
    operators_page.record("taken", events_of(team, "taken"))

    team.apply(osftjob("deleted", maxSteps=3, splitBy=None, retentionTokens=None))
    wait_for("its PyTorchJob", lambda: "deleted" in team.kubectl("get", "pytorchjobs"))
    wait_for("it is known", lambda: "pyTorchJobUID" in team.status("deleted"))
    team.kubectl("delete", "pytorchjob", "deleted")
    wait_for("the next", lambda: "deleted-a2" in team.kubectl("get", "pytorchjobs"))
    team.wait_phase("deleted", "Succeeded")
    wait_for("its last event", lambda: "Done" in events_of(team, "deleted")[1])
    listed = team.kubectl("get", "osftjob", "deleted")
    command = "kubectl -n team delete pytorchjob deleted; kubectl -n team get osftjob deleted"
    said = (command, listed), events_of(team, "deleted")
    operators_page.record("deleted", *said, only_the_end=True)


def test_what_the_operator_may_do_and_which_replica_works(team: Jobs) -> None:
    role = team.kubectl("describe", "clusterrole", f"osft-{SYSTEM}")
    table = role[role.index("PolicyRule:") :]
    operators_page.record("rights", (f"kubectl describe clusterrole osft-{SYSTEM}", table))
    leases = team.cluster.plane.kubectl("-n", SYSTEM, "get", "lease")
    operators_page.record("lease", (f"kubectl -n {SYSTEM} get lease", leases))

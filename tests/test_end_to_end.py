"""`kubectl apply` to a trained checkpoint: real API server, operator, torchrun and checkpoints.

The operator runs as its own process under the chart's ServiceAccount. What happens to jobs that are
killed, deleted, changed, suspended or wrong is in test_end_to_end_faults.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import score
import yaml
from packaging.requirements import Requirement

from osftjobs import NEW, OLD, Jobs, osftjob

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]


def test_apply_trains_on_two_nodes_of_two_processes(jobs: Jobs, tmp_path: Path) -> None:
    """(a) The main path, and what kubectl shows of it."""
    # Twice the quickstart's rate: its base model has learned one skill only, and other processors
    # round it to another one, which learns more slowly.
    job = osftjob("two-by-two", spec={"nnodes": 2, "nprocPerNode": 2}, learningRate=4e-3)
    assert "osftjob.osft.dev/two-by-two created" in jobs.apply(job)
    jobs.wait_phase("two-by-two", "Running", "Succeeded")
    assert " 1/200  loss" in _log_when(jobs, "two-by-two-master-0", " 1/200  loss")
    jobs.wait_step("two-by-two", 80, timeout_seconds=300)
    print(jobs.kubectl("get", "osftjobs"))
    jobs.wait_phase("two-by-two", "Succeeded", timeout_seconds=400)
    waited = jobs.kubectl("wait", "--for=condition=Complete", "osftjob/two-by-two")
    assert "condition met" in waited

    table = jobs.kubectl("get", "osftjobs").splitlines()
    assert " ".join(table[0].split()) == "NAME PHASE PROGRESS LOSS ETA NODES RESTARTS AGE"
    assert table[1].split()[:4] == ["two-by-two", "Succeeded", "100%", "200/200"]
    wide = jobs.kubectl("get", "osft", "-o", "wide")
    assert "/models/skills" in wide
    kept = jobs.status("two-by-two")["retention"]
    assert kept["summary"] in wide
    assert kept["lossAfter"] < kept["lossBefore"] + 0.1
    described = jobs.kubectl("describe", "osftjob", "two-by-two")
    for words in ("Done", "Phase:", "Succeeded", "World Size:", "/checkpoints/two-by"):
        assert words in described, described
    print("\n".join([*table, wide, described]))
    logs = jobs.kubectl("logs", "two-by-two-master-0")
    assert "wrote the model after step 200" in logs

    plan = json.loads(jobs.folder("two-by-two").plan.read_text())
    assert plan, "plan.json says what was trained"
    before = _scores_by_transformers_alone(jobs.claim("models") / "skills", tmp_path)
    after = _scores_by_transformers_alone(jobs.folder("two-by-two").final, tmp_path)
    assert before[NEW] <= 0.1
    assert after[NEW] >= 0.9
    assert after[OLD] >= before[OLD] - 0.05


def test_the_same_file_runs_without_a_cluster(jobs: Jobs, learned: Path, tmp_path: Path) -> None:
    """`osft run` of a short job gives the cluster's losses; threads may differ, so nearly."""
    # By weights: with another number of threads the model may write another text.
    changes = {"splitBy": None, "retentionTokens": None, "checkpointEverySteps": None}
    job = osftjob("everywhere", maxSteps=6, **changes)
    jobs.apply(job)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "skills").symlink_to(learned)
    (tmp_path / "datasets").symlink_to(jobs.claim("datasets"))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    command = [Path(sys.executable).with_name("osft"), "run", file, "--volumes", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "osftjob/everywhere  Succeeded  100% 6/6" in done.stdout
    jobs.wait_phase("everywhere", "Succeeded")
    here = tmp_path / "everywhere-checkpoints" / "everywhere" / "metrics.jsonl"
    mine = [json.loads(line)["loss"] for line in here.read_text().splitlines()]
    assert mine == pytest.approx(jobs.losses("everywhere"), rel=1e-4)


def _log_when(jobs: Jobs, pod: str, words: str) -> str:
    from cluster.api import wait_for

    wait_for(
        f"{words!r} in the log of {pod}",
        lambda: words in jobs.kubectl("logs", pod, check=False),
        timeout_seconds=120,
        every_seconds=1,
    )
    return jobs.kubectl("logs", pod)


def _scores_by_transformers_alone(model: Path, folder: Path) -> dict[str, float]:
    """Score in a process that can import transformers and what it needs, and nothing of ours."""
    site = _only(["transformers", "torch"], folder / "only-transformers")
    program = (
        "import sys, importlib.util as u\n"
        "assert u.find_spec('osft_trainer') is None and u.find_spec('kopf') is None\n"
        "import runpy; sys.argv = ['score.py', *sys.argv[1:]]\n"
        f"sys.path.insert(0, {str(Path(score.__file__).parent)!r})\n"
        "runpy.run_module('score', run_name='__main__')"
    )
    interpreter = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [interpreter, "-S", "-c", program, model, NEW, OLD],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scores: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def _only(names: list[str], folder: Path) -> Path:
    """A site folder with links to these distributions and all they require, nothing else."""
    if folder.exists():
        return folder
    folder.mkdir()
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop().lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for text in found.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        for top in {file.parts[0] for file in found.files or [] if ".." not in file.parts}:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder

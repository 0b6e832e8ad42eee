"""The launcher: what it starts, whose exit code it takes, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from launching import Launcher, children, free_port, is_alive, until
from osft_trainer.arguments import from_argv
from osft_trainer.config import LaunchParameters
from osft_trainer.launch import RANK_PROGRAM
from osft_trainer.report import (
    ExitCode,
    Owner,
    Progress,
    RunFolder,
    Termination,
    Verdict,
    read_document,
)
from osft_trainer.topology import ALONE, Topology, resolve, usable_cpus

MASTER = {"PET_NNODES": "2", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"}


def settle(environ: dict[str, str], gpus: int = 0, **given: object) -> Topology:
    return resolve(LaunchParameters(**given), environ, lambda: gpus)  # type: ignore[arg-type]


def test_nothing_given_is_one_process_that_meets_nobody() -> None:
    found = settle({})
    assert found.is_single_process
    assert (found.backend, found.endpoint, found.max_restarts) == ("c10d", ALONE, 0)


@pytest.mark.parametrize(
    ("asked", "gpus", "count"),
    [("auto", 0, 1), ("auto", 8, 8), ("gpu", 4, 4), ("cpu", 0, 1), ("3", 8, 3)],
)
def test_processes_are_counted_by_gpus_never_by_cpus(asked: str, gpus: int, count: int) -> None:
    assert settle({"PET_NPROC_PER_NODE": asked}, gpus).nproc_per_node == count


@pytest.mark.parametrize(
    "given", [{"rdzv_endpoint": "0.0.0.0:1"}, {"master_addr": "host", "master_port": 7}]
)
def test_a_node_that_is_alone_opens_no_meeting_point(given: dict[str, object]) -> None:
    environ = {"PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_NNODES": "1:1"}
    for found in (settle(environ), settle({}, **given), settle({"PET_MASTER_ADDR": "h"}, **given)):
        assert (found.backend, found.endpoint) == ("c10d", ALONE)


def test_parameters_beat_the_environment() -> None:
    environ = {**MASTER, "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4"}
    found = settle(environ)
    assert (found.backend, found.endpoint, found.node_rank) == ("static", "job-master-0:23456", 1)
    found = settle(environ, nnodes=3, node_rank=2, nproc_per_node=1, rdzv_endpoint="host:1")
    assert (found.max_nodes, found.node_rank, found.nproc_per_node) == (3, 2, 1)
    assert (found.backend, found.endpoint) == ("c10d", "host:1")
    found = settle(environ, master_addr="other", master_port=7)
    assert (found.backend, found.endpoint) == ("static", "other:7")


def test_the_elastic_variables_of_a_pytorchjob_are_read() -> None:
    environ = {
        "PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ID": "uid", "PET_NNODES": "2:4", "PET_MAX_RESTARTS": "3",
        "PET_RDZV_CONF": "timeout=60,join_timeout=30",
    }  # fmt: skip
    found = settle(environ)
    assert (found.min_nodes, found.max_nodes, found.max_restarts) == (2, 4, 3)
    assert (found.backend, found.endpoint, found.rdzv_id) == ("c10d", "job-worker-0:23456", "uid")
    assert found.rdzv_conf == {"timeout": "60", "join_timeout": "30"}


@pytest.mark.parametrize(
    ("environ", "given", "named"),
    [
        ({}, {"nproc_per_node": "gpu"}, "no CUDA device"),
        ({"PET_NPROC_PER_NODE": "many"}, {}, "nproc_per_node 'many'"),
        ({"PET_NNODES": "two"}, {}, "PET_NNODES 'two'"),
        ({"PET_NNODES": "4:2"}, {}, "MIN at most MAX"),
        ({}, {"nnodes": 2}, "needs a place to meet"),
        (MASTER, {}, "needs node_rank"),
        (MASTER, {"node_rank": 2}, "below nnodes 2"),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "long"}, {}, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT 'long'"),
        ({"PET_MAX_RESTARTS": "-1"}, {}, "PET_MAX_RESTARTS '-1'"),
        ({"PET_RDZV_CONF": "timeout"}, {}, "PET_RDZV_CONF 'timeout'"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(
    environ: dict[str, str], given: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        settle(environ, **given)


@pytest.mark.parametrize(
    ("ranks", "code", "rank", "said"),
    [
        ({0: "done", 1: "done"}, ExitCode.DONE, 0, ""),
        ({0: "loses its peer", 1: "bad input"}, ExitCode.BAD_INPUT, 1, "line 3 is no JSON"),
        ({0: "diverges", 1: "loses its peer"}, ExitCode.DIVERGED, 0, "NaN at step 4"),
        ({0: "crashes"}, ExitCode.TRY_AGAIN, 0, "KeyError: 'layer'"),
        ({0: "ends silently"}, ExitCode.TRY_AGAIN, -1, "rank 0 ended with exit code 1"),
        ({0: "is killed", 1: "loses its peer"}, ExitCode.TRY_AGAIN, -1, "rank 0 was killed"),
        (
            {1: "crashes in native code", 0: "loses its peer"},
            ExitCode.TRY_AGAIN,
            -1,
            "rank 1 was ended by SIGSEGV; its log has the Python stacks",
        ),
    ],
    ids=lambda value: "+".join(value.values()) if isinstance(value, dict) else None,
)
def test_the_first_failed_rank_gives_code_and_words(
    tmp_path: Path, ranks: dict[int, str], code: ExitCode, rank: int, said: str
) -> None:
    launcher = Launcher(tmp_path, ranks)
    assert launcher.wait() == code
    assert (launcher.words.exit_code, launcher.words.rank) == (code, rank)
    assert said in launcher.words.message


def test_ranks_of_one_node_need_no_name_of_the_host(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {0: "done", 1: "done"}, {"PET_MASTER_ADDR": "job-master-0"})
    assert launcher.wait() == 0
    assert {launcher.seen(rank)["MASTER_ADDR"] for rank in (0, 1)} == {"127.0.0.1"}


def test_ranks_are_asked_to_save_at_sigterm(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {0: "saves when asked", 1: "saves when asked"})
    launcher.wait_for("waiting-0", "waiting-1")
    launcher.terminate()
    launcher.terminate(signal.SIGINT)
    assert launcher.wait() == ExitCode.PREEMPTED
    assert launcher.words.message == "saved after step 5"


def test_patience_with_a_rank_that_does_not_save_ends(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {0: "is deaf"}, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"})
    launcher.wait_for("waiting-0")
    pid = launcher.seen(0)["pid"]
    launcher.terminate()
    assert launcher.wait() == ExitCode.TRY_AGAIN
    assert "raise TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in launcher.words.message
    assert not is_alive(pid)


def test_a_launcher_that_waits_for_another_node_can_be_stopped(tmp_path: Path) -> None:
    """Torch waits inside C++ there, where Python calls no signal handler."""
    port = free_port()
    launcher = Launcher(
        tmp_path, {0: "done"}, nnodes=2, node_rank=1, master_addr="127.0.0.1", master_port=port
    )
    until(lambda: is_waiting(launcher.process.pid))
    launcher.terminate()
    assert launcher.wait(30) == ExitCode.PREEMPTED
    assert launcher.words.reason == "Preempted"


def is_waiting(pid: int | None) -> bool:
    """Whether the launcher has its thread for signals: from then on it waits for the other node."""
    return any(int(task.name) != pid for task in Path(f"/proc/{pid}/task").iterdir())


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_nodes_make_one_world(tmp_path: Path, backend: str) -> None:
    port = free_port()
    nodes = []
    for node in range(2):
        if backend == "static":
            place = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        else:
            place = {"PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_RDZV_ID": "uid"}
        environ = {
            "PET_NNODES": "2",
            "PET_NODE_RANK": str(node),
            "PET_NPROC_PER_NODE": "2",
            **place,
        }
        # What the PyTorchJob's own variables say must not matter.
        environ |= {"RANK": str(node), "WORLD_SIZE": "9", "MASTER_ADDR": "nowhere"}
        nodes.append(Launcher(tmp_path, {}, environ, nproc_per_node=None))
    assert [node.wait() for node in nodes] == [0, 0]
    seen = [nodes[0].seen(rank) for rank in range(4)]
    assert {one["WORLD_SIZE"] for one in seen} == {"4"}
    assert [one["LOCAL_RANK"] for one in seen] == ["0", "1", "0", "1"]
    assert {one["MASTER_ADDR"] for one in seen} != {"nowhere"}
    # Each rank gets all arguments, and its share of the CPUs.
    assert from_argv(seen[0]["argv"]) == from_argv(nodes[0].argv)
    assert {one["OMP_NUM_THREADS"] for one in seen} == {str(max(1, usable_cpus() // 2))}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--unfreeze-rank-ratio=2", "unfreeze_rank_ratio"),
        ("--learning-rte=1", "did you mean '--learning-rate'"),
        ("--nproc-per-node=gpu", "no CUDA device"),
    ],
)
def test_wrong_arguments_start_no_rank(tmp_path: Path, argument: str, said: str) -> None:
    argv = [*tiny.argv(tmp_path, tmp_path, tmp_path / "run"), argument]
    launcher = Launcher(tmp_path, {0: "done"}, argv=argv)
    assert launcher.wait() == ExitCode.BAD_INPUT
    assert said in launcher.words.message
    assert not list(tmp_path.glob("seen-*"))


def test_a_verdict_of_this_run_stands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    verdict = Verdict(run_id=tiny.RUN_ID, exit_code=3, reason="Diverged", message="NaN")
    folder.verdict.write_text(verdict.to_json())
    launcher = Launcher(tmp_path, {0: "done"})
    assert launcher.wait() == ExitCode.DIVERGED
    assert (launcher.words.reason, launcher.words.message) == ("Diverged", "NaN")
    assert not list(tmp_path.glob("seen-*"))
    folder.verdict.write_text(verdict.model_copy(update={"run_id": "another"}).to_json())
    assert Launcher(tmp_path, {0: "done"}).wait() == 0


def test_a_finished_run_starts_no_rank(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.final.mkdir(parents=True)
    folder.owner.write_text(Owner(run_id=tiny.RUN_ID).to_json())
    folder.progress.write_text(Progress(run_id=tiny.RUN_ID, step=6, loss=0.5).to_json())
    (folder.final / "COMPLETE").touch()
    launcher = Launcher(tmp_path, {0: "bad input"})
    assert launcher.wait() == 0
    assert launcher.words.reason == "AlreadyFinished"
    assert launcher.words.progress is not None
    assert launcher.words.progress.step == 6
    assert not list(tmp_path.glob("seen-*"))


def test_a_run_that_was_done_when_the_signal_came_is_done(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {0: "is done when asked", 1: "is done when asked"})
    launcher.wait_for("waiting-0", "waiting-1")
    launcher.terminate()
    assert launcher.wait() == ExitCode.DONE
    assert launcher.words.reason == "Done"


def test_a_folder_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    """Through the launcher, whose own look into the folder fails before any rank starts."""
    (tmp_path / "file").touch()
    argv = tiny.argv(tmp_path, tmp_path, tmp_path / "file" / "run")
    launcher = Launcher(tmp_path, {}, argv=argv, program=RANK_PROGRAM)
    assert launcher.wait() == ExitCode.BAD_INPUT
    assert "cannot write in" in launcher.words.message


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.data_file(tmp_path / "data.jsonl")
    return tiny.model_folder(tmp_path / "model")


def test_a_real_run_ends_with_its_progress_in_the_termination_message(
    base: Path, tmp_path: Path
) -> None:
    """The command of the container, two ranks over gloo, from arguments to final/."""
    argv = tiny.argv(base, tmp_path / "data.jsonl", tmp_path / "run", nproc_per_node=2,
                     metrics_port=free_port())  # fmt: skip
    environ = {**os.environ, "OSFT_TERMINATION_LOG": str(tmp_path / "words")}
    done = subprocess.run([sys.executable, "-m", "osft_trainer.launch", *argv], env=environ)
    assert done.returncode == 0
    folder = RunFolder(tmp_path / "run")
    assert RunFolder.is_complete(folder.final)
    words = read_document(tmp_path / "words", Termination)
    assert words is not None
    assert (words.reason, words.exit_code) == ("Done", 0)
    assert words.progress is not None
    assert (words.progress.step, words.progress.final) == (6, str(folder.final))


def test_a_rank_that_crashes_in_native_code_shows_where(base: Path, tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from osft_trainer import __main__ as rank\n"
        "rank._run = lambda *told: os.abort()\n"
        "rank.main()"
    )
    argv = tiny.argv(base, tmp_path / "data.jsonl", tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "in main" in done.stderr


def test_ranks_save_and_end_when_their_launcher_is_killed(base: Path, tmp_path: Path) -> None:
    argv = tiny.argv(base, tmp_path / "data.jsonl", tmp_path / "run", training_mode="infinite",
                     lr_scheduler="constant", save_final_checkpoint=False)  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    launcher = Launcher(tmp_path, {}, argv=argv, program=RANK_PROGRAM)
    try:
        until(lambda: steps(folder) > 1, 120)
        (rank,) = children(launcher.process.pid)
    finally:
        launcher.process.kill()
    until(lambda: not is_alive(rank), 60)
    assert folder.complete_checkpoints()


def steps(folder: RunFolder) -> int:
    progress = read_document(folder.progress, Progress)
    return 0 if progress is None else progress.step

"""Launchers as processes of their own, with ranks that end as they are told (`told_rank`)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
from osft_trainer import launch, shared_folder
from osft_trainer.parallel import start_world, stop_world
from osft_trainer.report import TERMINATION_LOG_ENV, Termination, read_document

_LISTENING = "0A"
"""The kernel's number of that state of a socket, in /proc/net/tcp."""

_CONTEXT = multiprocessing.get_context("forkserver")
_TOLD_RANK = (sys.executable, str(Path(__file__).with_name("told_rank.py")))


class Launcher:
    """One launcher on one node; ranks are told what to do by their global rank."""

    def __init__(
        self, folder: Path, ranks: dict[int, str], environ: dict[str, str] | None = None,
        argv: list[str] | None = None, program: Sequence[str] = _TOLD_RANK, **changes: Any,
    ) -> None:  # fmt: skip
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "termination"
        told = {
            "TOLD_RANKS": json.dumps(ranks),
            "TOLD_FOLDER": str(folder),
            TERMINATION_LOG_ENV: str(self.log),
        }
        changes.setdefault("nproc_per_node", len(ranks))
        self.argv = argv or tiny.argv(folder, folder, folder / "run", **changes)
        environ = {**told, **(environ or {})}
        tiny._start_fork_server()
        self.process = _CONTEXT.Process(target=_main, args=(self.argv, environ, program))
        self.process.start()

    def wait(self, seconds: float = 60) -> int | None:
        """Exit code; a launcher that hangs is killed and gives -9."""
        return tiny.finish([self.process], seconds)[0]

    def wait_for(self, *names: str, seconds: float = 60) -> None:
        """Until files are in the folder."""
        until(lambda: all((self.folder / name).exists() for name in names), seconds)

    def seen(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"seen-{rank}.json").read_text())
        return found

    def terminate(self, number: int = signal.SIGTERM) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def words(self) -> Termination:
        found = read_document(self.log, Termination)
        assert found is not None, "no termination message"
        return found


def _main(argv: list[str], environ: dict[str, str], program: Sequence[str]) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(environ)
    sys.exit(launch.run_command(argv, program))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that other processes do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int | None) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listeners(pid: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which a process or a descendant of it listens."""
    ours = {pid}
    for parent in list(ours):
        ours |= descendants(parent)
    inodes = {
        os.readlink(handle).removeprefix("socket:[").removesuffix("]")
        for process in ours
        for handle in Path(f"/proc/{process}/fd").iterdir()
        if handle.is_symlink()
    }
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = [
                    bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)
                ]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def descendants(pid: int) -> set[int]:
    found = set(children(pid))
    return found.union(*(descendants(child) for child in found))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def probe_ranks(folders: list[Path]) -> list[int | None]:
    """Let one real rank a folder look whether theirs is shared; 0: yes, 2: a ValueError."""
    tiny._start_fork_server()
    port = free_port()
    ranks = [
        _CONTEXT.Process(target=_probe, args=(folder, rank, len(folders), port))
        for rank, folder in enumerate(folders)
    ]
    for rank in ranks:
        rank.start()
    return tiny.finish(ranks)


def _probe(folder: Path, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    world = start_world("cpu")
    try:
        shared_folder.probe(folder, world, patience_seconds=0.5)
    except ValueError as error:
        (folder / "said").write_text(str(error))
        sys.exit(2)
    finally:
        stop_world(world)

"""The folder of prepared data: made once, whole or not at all, with little in memory."""

import contextlib
import errno
import fcntl
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_rows import TEMPLATE, make_tokenizer, prepare_default, prepared, row, trained_text, write
from osft_trainer import data as data_module
from osft_trainer import samples as samples_module
from osft_trainer.data import open_prepared, prepare
from osft_trainer.faults import Faults
from osft_trainer.leftovers import WRITING
from osft_trainer.prepared import PreparedWriter
from osft_trainer.samples import TEXTS_AT_ONCE, Chat
from osft_trainer.sources import Row


def test_preparation_holds_a_few_conversations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were read and not yet written: never more than one group of them."""
    read = written = most = 0
    real_append = PreparedWriter.append

    def rows(files: list[Path], faults: Faults) -> Iterator[Row]:
        nonlocal read, most
        for number in range(300):
            read += 1
            most = max(most, read - written)
            yield Row(f"row {number}", row(answer="n" * 200))

    def append(writer: PreparedWriter, *sample: Any) -> int:
        nonlocal written
        written += 1
        return real_append(writer, *sample)

    monkeypatch.setattr(data_module, "read_rows", rows)
    monkeypatch.setattr(PreparedWriter, "append", append)
    file = write(tmp_path / "d.jsonl", "")
    assert len(prepare_default(file, tmp_path, max_seq_len=500)) == written == 300
    assert most <= TEXTS_AT_ONCE + 1
    read = written = most = 0
    monkeypatch.setattr(samples_module, "CHARACTERS_AT_ONCE", 2_000)
    prepare_default(write(tmp_path / "d.jsonl", "x"), tmp_path, max_seq_len=500)
    assert most <= 2_000 // 200 + 1, "long texts go in smaller groups"


def test_second_call_opens_what_the_first_wrote(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    first = prepare_default(file, tmp_path / "cache")
    stamp = (first.folder / "input_ids.npy").stat().st_mtime_ns
    second = prepare_default(file, tmp_path / "cache")
    assert second.folder == first.folder == tmp_path / "cache" / "data" / first.digest
    assert (second.folder / "input_ids.npy").stat().st_mtime_ns == stamp
    assert [p.name for p in (tmp_path / "cache" / "data").iterdir()] == [first.digest]
    assert first.folder.stat().st_mode & 0o777 == 0o755


def test_a_full_disk_is_told_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write(tmp_path / "d.jsonl", row())
    monkeypatch.setattr(PreparedWriter, "append", no_space)
    with pytest.raises(OSError, match=r"cache/data: No space left on device; free or add space"):
        prepare_default(file, tmp_path / "cache")
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_digest_follows_what_decides_the_content(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    base = prepare_default(file, tmp_path).digest
    renamed = write(tmp_path / "other.jsonl", row())
    assert prepare_default(renamed, tmp_path).digest == base
    others = {
        prepare_default(file, tmp_path, max_seq_len=99).digest,
        prepared(file, tmp_path, on_overlong="drop").digest,
        prepare_default(file, tmp_path, on_bad_sample="skip").digest,
        prepare_default(file, tmp_path, form=Chat(unmask=True)).digest,
        prepare_default(write(tmp_path / "e.jsonl", row(answer="no")), tmp_path).digest,
        prepare(
            file,
            make_tokenizer("<s>" + TEMPLATE),
            max_seq_len=100,
            on_overlong="error",
            cache_root=tmp_path,
        ).digest,
    }
    assert len(others | {base}) == 7


def test_folder_that_is_not_complete_is_made_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    data = prepare_default(file, tmp_path)
    (data.folder / "COMPLETE").unlink()
    (data.folder / "input_ids.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not complete"):
        open_prepared(data.folder)
    assert trained_text(prepare_default(file, tmp_path), 0) == "yes<e>"


def test_damaged_folder_is_refused_and_made_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    data = prepare_default(file, tmp_path)
    np.save(data.folder / "loss_mask.npy", np.zeros(3, dtype=np.bool_))
    with pytest.raises(ValueError, match="is damaged"):
        open_prepared(data.folder)
    assert trained_text(prepare_default(file, tmp_path), 0) == "yes<e>"
    for name in ("meta.json", "input_ids.npy"):
        (data.folder / name).write_bytes(b"\0")
        assert trained_text(prepare_default(file, tmp_path), 0) == "yes<e>"


STUCK = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import data_rows
def rename(path, to):
    print(path.name, flush=True)
    time.sleep(600)
pathlib.Path.rename = rename
data_rows.prepare_default(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
"""


@contextlib.contextmanager
def stuck_preparation(file: Path, cache: Path) -> Iterator[tuple[Any, str]]:
    """A process that has written everything, and its folder, which has not got its name yet."""
    arguments = [sys.executable, "-c", STUCK, str(Path(__file__).parent), file, cache]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that a preparation of one row has left, which SIGKILL has ended."""
    folder = tmp_path_factory.mktemp("killed")
    with stuck_preparation(write(folder / "d.jsonl", row()), folder) as (process, work):
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert [path.name for path in (folder / "data").iterdir()] == [work]
    assert work.startswith(".")
    return folder


@pytest.mark.parametrize("answer", ["yes", "other"])
def test_killed_preparation_leaves_nothing_behind_the_next(
    tmp_path: Path, killed: Path, answer: str
) -> None:
    """Also where the data have changed since, or are prepared by now."""
    cache = shutil.copytree(killed, tmp_path / "cache")
    file = write(tmp_path / "d.jsonl", row(answer=answer))
    data = prepare_default(file, cache)
    assert trained_text(data, 0) == f"{answer}<e>"
    assert [path.name for path in (cache / "data").iterdir()] == [data.digest]
    shutil.copytree(killed, cache, dirs_exist_ok=True)
    assert len(list((cache / "data").iterdir())) == 2
    assert prepare_default(file, cache).folder == data.folder
    assert [path.name for path in (cache / "data").iterdir()] == [data.digest]


def test_a_preparation_that_goes_on_keeps_its_folder(tmp_path: Path) -> None:
    """As of `osft plan` beside a run."""
    file, cache = write(tmp_path / "d.jsonl", row()), tmp_path / "cache"
    with stuck_preparation(file, cache) as (process, work):
        before = sorted(path.name for path in (cache / "data" / work).iterdir())
        data = prepare_default(file, cache)
        assert sorted(path.name for path in (cache / "data").iterdir()) == [work, data.digest]
        assert sorted(path.name for path in (cache / "data" / work).iterdir()) == before
        assert process.poll() is None


@pytest.mark.parametrize("without_locks", ["writer", "reader"])
def test_leftovers_stay_where_nothing_can_be_locked(
    tmp_path: Path, killed: Path, monkeypatch: pytest.MonkeyPatch, without_locks: str
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    cache = shutil.copytree(killed, tmp_path / "cache")
    (work,) = (cache / "data").iterdir()
    if without_locks == "writer":
        (work / WRITING).unlink()
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    data = prepare_default(write(tmp_path / "d.jsonl", row()), cache)
    assert sorted(path.name for path in (cache / "data").iterdir()) == [work.name, data.digest]
    assert not (data.folder / WRITING).exists()


def test_arrays_are_little_endian_and_mapped(tmp_path: Path) -> None:
    data = prepare_default(write(tmp_path / "d.jsonl", row()), tmp_path)
    kinds = {f.name: np.load(f, mmap_mode="r").dtype.str for f in data.folder.glob("*.npy")}
    assert kinds == {
        "input_ids.npy": "<i4",
        "loss_mask.npy": "|b1",
        "offsets.npy": "<i8",
        "loss_counts.npy": "<i4",
    }
    assert isinstance(data._ids.base, np.memmap)

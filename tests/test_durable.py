"""The exchange of folders: at whatever moment it is cut, the old or the new one is there, whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from osft_trainer.durable import (
    complete,
    put_back,
    put_in_place,
    remove_unfinished,
    told,
    work_folder,
)
from osft_trainer.report import RunFolder


def written(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "text").write_text(text)
    complete(folder)
    return folder


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_in_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """After so many renames of the two that it takes."""
    out = written(tmp_path / "best", "old")
    written(tmp_path / "other", "never touched")
    work = written(work_folder(out, "t1"), "new")
    done, real = 0, Path.rename

    def rename(path: Path, target: Path) -> Path:
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                put_in_place(work, out)
        else:
            put_in_place(work, out)
    for _ in range(2):  # doing it again changes nothing
        put_back(tmp_path, "*")
        remove_unfinished(tmp_path, "*")
        assert (out / "text").read_text() == ("new" if renames == 2 else "old")
        assert RunFolder.is_complete(out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "other"]


def test_only_the_named_is_mended(tmp_path: Path) -> None:
    for name in (".profile.old", ".notes.txt.writing", ".final.old", ".final.t.writing"):
        (tmp_path / name).mkdir()
    put_back(tmp_path, "final")
    remove_unfinished(tmp_path, "final")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".notes.txt.writing", ".profile.old", "final"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            "No space left on device: a/b; free or add space on this volume",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "SafetensorError: I/O error: No space left on device (os error 28); free or add space "
            "on this volume",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "Disk quota exceeded; free or add space on this volume",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "a/b"),
            "Read-only file system: a/b; this volume must be writable",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: a/b"),
        (
            OSError("out: No space left on device; free or add space on this volume"),
            "out: No space left on device; free or add space on this volume",
        ),
        (OSError("another rank could not write"), "another rank could not write"),
    ],
)
def test_a_disk_that_takes_nothing_is_told_with_a_cure(error: Exception, words: str) -> None:
    assert told(error) == words

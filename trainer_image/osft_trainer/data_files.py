"""What a data path stands for: the files that are read, and what is not read and why.

Lives here: files, folders, patterns, splits. Must never: read rows (`sources` does), pass over a
file that looks like data, or import torch.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osft_trainer.file_kinds import KINDS, DataFile, Unreadable, check_readable, kind_of

_DESCRIPTIONS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
"""What the datasets package writes beside the data."""

_OF_A_RUN = ("OWNER", "COMPLETE")
"""Markers in folders that a run writes; what is in them is no training data."""

_SPLITS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words of file and folder names that name a split, as on the Hugging Face hub."""

_SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join(_SPLITS)})(?![a-z])")


@dataclass(frozen=True)
class DataFiles:
    """What a data path stands for."""

    files: tuple[DataFile, ...]
    """In the order in which they are read: that of their names."""
    not_read: Mapping[str, str]
    """By name, why: nobody shall believe that a file was trained on when it was not."""

    def to_json(self, most: int = 100) -> dict[str, Any]:
        """For plan.json: how many files, and the first names."""
        return {
            "fileCount": len(self.files),
            "files": [file.name for file in self.files[:most]],
            "notRead": dict(list(self.not_read.items())[:most]),
        }

    def to_lines(self, most: int = 10) -> list[str]:
        """For people: what is read, what is not."""
        names = [file.name for file in self.files]
        lines = [f"files read: {_listed(names, most)}"]
        if self.not_read:
            passed = [f"{name} ({why})" for name, why in self.not_read.items()]
            lines.append(f"files not read: {_listed(passed, most)}")
        return lines


def find_data_files(data_path: str | Path) -> DataFiles:
    """The files that a path stands for: a file, a folder with all below it, or a pattern.

    A folder that `save_to_disk` wrote gives the files that its state.json lists; with several
    splits it must be named down to the split. In other folders hidden files, model folders and run
    folders are left out. A pattern (`*`, `?`, `[...]`, `**` for folders) gives what it matches.

    Raises:
        ValueError: there is no such path, no file of a known kind, files of several kinds or
            splits, or one that looks like data and cannot be read; says what to do.
    """
    path = Path(data_path)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return DataFiles((DataFile.named(path),), {})
    if glob.has_magic(str(path)):
        return _of_pattern(path)
    raise ValueError(
        f"data_path {str(path)!r} does not exist: give a file, a folder of files, or a pattern"
    )


def _of_pattern(pattern: Path) -> DataFiles:
    """Whoever writes a pattern has chosen: nobody asks for splits."""
    # What stands before the first wildcard is in every name.
    root = Path(re.split(r"[*?\[]", str(pattern), maxsplit=1)[0] + "x").parent
    candidates: list[Path | DataFile] = []
    not_read: dict[str, str] = {}
    for match in sorted(glob.glob(str(pattern), recursive=True)):
        path = Path(match)
        if not path.is_dir():
            # A suffix that the pattern names is a choice, too: *.txt is JSON Lines.
            chosen = path.suffix and path.suffix == pattern.suffix
            named = path.is_file() and chosen and kind_of(path)[0] is None
            name = os.path.relpath(path, root)
            candidates.append(DataFile(path, name, "jsonl", None) if named else path)
        elif "**" not in pattern.parts:
            name = os.path.relpath(path, root)
            not_read[f"{name}/"] = "a folder; ** in the pattern reads what lies in folders"
    if not candidates:
        raise ValueError(f"data_path {str(pattern)!r} matches no file")
    files = _readable(pattern, root, candidates, not_read)
    return DataFiles(_one_kind(pattern, files), not_read)


def _of_folder(path: Path) -> DataFiles:
    if (path / "dataset_dict.json").is_file():
        return _of_folder(_only_split(path))
    if (path / "state.json").is_file():
        return DataFiles(tuple(_saved_files(path, path)), {})
    not_read: dict[str, str] = {}
    files = _readable(path, path, _walk(path, path, not_read), not_read)
    _check_splits(path, files)
    return DataFiles(_one_kind(path, files), not_read)


def _readable(
    given: Path, root: Path, candidates: Iterable[Path | DataFile], not_read: dict[str, str]
) -> list[DataFile]:
    """Those that are data; what is not goes into `not_read`.

    Raises:
        ValueError: some look like data and cannot be read.
    """
    files: list[DataFile] = []
    refused: list[str] = []
    for found in candidates:
        if isinstance(found, DataFile):
            files.append(found)
            continue
        name = os.path.relpath(found, root)
        try:
            file = _data_file(found, name)
        except Unreadable as error:
            refused.append(f"{name}: {error}")
            continue
        if isinstance(file, DataFile):
            files.append(file)
        else:
            not_read[name] = file
    if refused:
        raise ValueError(
            f"data_path {str(given)!r} holds what cannot be read: {_listed(refused, 5)}; mend it, "
            f"move it away, or give a pattern such as {str(root / '*.jsonl')!r}"
        )
    return files


def _one_kind(path: Path, files: list[DataFile]) -> tuple[DataFile, ...]:
    """The files in order, if they are of one kind and none seems to be there twice.

    Raises:
        ValueError: it is not so, or there is no file.
    """
    files = sorted(files, key=lambda file: file.name)
    if not files:
        suffixes = ", ".join(f"*{suffix}" for suffix in KINDS)
        raise ValueError(f"data_path {str(path)!r} holds no data file: name them {suffixes}")
    kinds = sorted({file.kind for file in files})
    if len(kinds) > 1:
        both = " and ".join(f"*.{kind}" for kind in kinds)
        raise ValueError(
            f"data_path {str(path)!r} holds {both}, perhaps the same data twice: leave one kind, "
            f"or give a pattern such as '*.{kinds[0]}' behind the folder"
        )
    by_stem: dict[str, DataFile] = {}
    for file in files:
        twin = by_stem.setdefault(file.stem, file)
        if twin is not file:
            raise ValueError(
                f"data_path {str(path)!r} holds {twin.name} and {file.name}, perhaps the same data "
                "twice: leave one of them"
            )
    return tuple(files)


def _check_splits(path: Path, files: Iterable[DataFile]) -> None:
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file.name), []).append(file.name)
    if len(set(splits) - {""}) < 2:
        return
    order = [*dict.fromkeys(_SPLITS.values()), ""]
    ways = [
        f"{str(path / _pattern(splits[split], splits))!r} ({split or 'no split'}, "
        f"{len(splits[split])} files)"
        for split in sorted(splits, key=order.index)
    ]
    raise ValueError(
        f"data_path {str(path)!r} holds several splits: give one of them: {', '.join(ways)}; or "
        f"{str(path / '**')!r} for all"
    )


def _split_of(name: str) -> str:
    """train, validation or test where a folder's or the file's name says so, else nothing."""
    found = (_SPLIT.search(part.lower()) for part in Path(name).parts)
    return next((_SPLITS[match[1]] for match in found if match), "")


def _pattern(names: list[str], splits: Mapping[str, list[str]]) -> str:
    """A pattern for these names and no others; where they do not begin alike, the first of them."""
    first, last = min(names), max(names)
    alike = (a == b for a, b in zip(first, last, strict=False))
    start = first[: sum(itertools.takewhile(bool, alike))]
    pattern = f"{start}*"
    # A wildcard of a pattern for files stops at a slash.
    matched = sum(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for name in itertools.chain.from_iterable(splits.values())
    )
    return pattern if len(names) > 1 and matched == len(names) else first


def _walk(root: Path, folder: Path, not_read: dict[str, str]) -> Iterator[Path | DataFile]:
    """All that lies below a folder, but what is hidden; saved datasets by what they list."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
            continue
        name = f"{path.relative_to(root)}/"
        if path.is_symlink() and root.resolve().is_relative_to(path.resolve()):
            not_read[name] = "a link to a folder that holds it"
        elif any((path / marker).is_file() for marker in _OF_A_RUN):
            not_read[name] = "written by a run"
        elif any(path.glob("*.safetensors")):
            not_read[name] = "a model folder"
        elif (path / "state.json").is_file():
            yield from _saved_files(path, root)
        else:
            yield from _walk(root, path, not_read)


def _data_file(path: Path, name: str) -> DataFile | str:
    """A file of a folder as it is read, or why it is passed over.

    Raises:
        Unreadable: it looks like data and cannot be read.
    """
    if not path.exists():
        raise Unreadable(f"a link to {os.readlink(path)}, which does not exist")
    if not path.is_file():
        return "no regular file"
    if path.name in _DESCRIPTIONS:
        return "describes a dataset"
    check_readable(path)
    kind, compression = kind_of(path)
    if kind is None:
        return "no kind of data file that is known"
    return DataFile(path, name, kind, compression)


def _only_split(path: Path) -> Path:
    splits = _json_file(path / "dataset_dict.json").get("splits", [])
    if len(splits) == 1:
        return path / str(splits[0])
    named = ", ".join(str(path / str(split)) for split in splits) or "none"
    raise ValueError(f"data_path {str(path)!r} holds several splits: give one of them: {named}")


def _saved_files(path: Path, root: Path) -> list[DataFile]:
    """The files of a saved dataset; others beside them (cache-*.arrow) are not data."""
    listed = _json_file(path / "state.json").get("_data_files", [])
    files = [path / str(entry["filename"]) for entry in listed]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"data_path {str(path)!r} is a saved dataset without {', '.join(missing) or 'files'}: "
            "copy it whole"
        )
    return [DataFile(file, str(file.relative_to(root)), "arrow") for file in files]


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def _listed(names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""Which files belong to a data path, and the rows in them, one at a time, in bounded memory.

Lives here: what a file or folder that a user names stands for, and which reader takes which kind of
file: `json_rows` or `tables`. Called by `data.prepare` for the rows, and by `identity` for the
files. Must never: hold a file in memory, judge what a row means (`samples` does), or import torch.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osft_trainer import json_rows, tables
from osft_trainer.faults import Faults


@dataclass(frozen=True)
class Row:
    """One row as it was read. `place` is "file, line 12" for messages to the user."""

    place: str
    value: Any


def data_files(data_path: str | Path) -> list[Path]:
    """The file itself, or those of a folder: of one kind, in the order of their names.

    A folder that `save_to_disk` wrote gives the files that its state.json lists; with several
    splits it must be named down to the split.

    Raises:
        ValueError: there is no such path, no file of a known kind, or files of several kinds.
    """
    path = Path(data_path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"data_path {str(path)!r} does not exist: give a file, or a folder of files"
        )
    if (path / "dataset_dict.json").is_file():
        return data_files(_only_split(path))
    if (path / "state.json").is_file():
        return _saved_files(path)
    found: dict[str, list[Path]] = {}
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        if file.suffix in _READERS and not file.name.startswith("."):
            found.setdefault(file.suffix, []).append(file)
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in _READERS)
        raise ValueError(f"data_path {str(path)!r} holds no data file: name them {kinds}")
    if len(found) > 1:
        kinds = " and ".join(f"*{suffix}" for suffix in found)
        raise ValueError(
            f"data_path {str(path)!r} holds {kinds}, perhaps the same data twice: leave one kind"
        )
    return next(iter(found.values()))


def _only_split(path: Path) -> Path:
    splits = _json_file(path / "dataset_dict.json").get("splits", [])
    if len(splits) == 1:
        return path / str(splits[0])
    named = ", ".join(str(path / str(split)) for split in splits) or "none"
    raise ValueError(f"data_path {str(path)!r} holds several splits: give one of them: {named}")


def _saved_files(path: Path) -> list[Path]:
    """The files of a saved dataset; others beside them (cache-*.arrow) are not data."""
    listed = _json_file(path / "state.json").get("_data_files", [])
    files = [path / str(entry["filename"]) for entry in listed]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"data_path {str(path)!r} is a saved dataset without {', '.join(missing) or 'files'}: "
            "copy it whole"
        )
    return files


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def read_rows(files: Sequence[Path], faults: Faults) -> Iterator[Row]:
    """Yield the rows of the files in order; lines that cannot be read go to `faults`.

    Raises:
        ValueError: `faults` is full, the first one lies far behind, or the rest of a file cannot be
            read.
    """
    for file in files:
        for place, value in _READERS.get(file.suffix, json_rows.of_lines)(file, faults):
            faults.raise_if_far()
            yield Row(place, value)


_READERS: Mapping[str, Callable[[Path, Faults], Iterator[tuple[str, Any]]]] = {
    ".jsonl": json_rows.of_lines,
    ".json": json_rows.of_json,
    ".parquet": tables.of_parquet,
    ".arrow": tables.of_arrow,
}
"""Kinds of files by their suffix. A file given by name with another suffix is read as JSONL."""

"""Files and their rows: one content in every kind, faults by file and place, bounded memory."""

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import ipc, parquet

import tiny
from osft_trainer import json_rows, tables
from osft_trainer.conversations import conversation
from osft_trainer.data import prepare
from osft_trainer.data_files import find_data_files
from osft_trainer.faults import Faults
from osft_trainer.features import row_decoder
from osft_trainer.file_kinds import DataFile
from osft_trainer.sources import read_rows

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"é{number}"}, {"role": "assistant", "content": "y"}]}
    for number in range(150)
]


def values_of(path: Path, faults: Faults | None = None) -> list[Any]:
    return [row.value for row in read_rows(find_data_files(path).files, faults or Faults())]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8-sig")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=40)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = arrow.Table.from_pylist(rows)
    with ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def write_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = arrow.Table.from_pylist(rows)
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


BEYOND = "7" * 5000
"""A whole number of more digits than Python turns into a number."""

KINDS: list[tuple[str, Callable[[Path, list[dict[str, Any]]], None], str]] = [
    ("d.jsonl", write_jsonl, "d.jsonl, line 3"),
    ("d.txt", write_jsonl, "d.txt, line 3"),
    ("d.json", write_json, "d.json, line 26 (element 3)"),
    ("lines.json", write_jsonl, "lines.json, line 3"),
    ("d.parquet", write_parquet, "d.parquet, row 3"),
    ("d.arrow", write_arrow, "d.arrow, row 3"),
    ("stream.arrow", write_arrow_stream, "stream.arrow, row 3"),
]


@pytest.mark.parametrize(("name", "write", "third"), KINDS, ids=[kind[0] for kind in KINDS])
def test_every_kind_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None], third: str
) -> None:
    write(tmp_path / name, ROWS)
    faults = Faults()
    read = list(read_rows(find_data_files(tmp_path / name).files, faults))
    assert [row.value for row in read] == ROWS
    assert read[2].place == third
    assert faults.rows == len(ROWS)


def write_saved(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


SAVED = ("saved", write_saved, "data-00000-of-00001.arrow, row 3")


@pytest.mark.parametrize(
    ("name", "write", "third"), [*KINDS, SAVED], ids=[kind[0] for kind in [*KINDS, SAVED]]
)
def test_a_bad_row_of_every_kind_is_named_by_file_place_and_reason(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None], third: str
) -> None:
    write(tmp_path / name, [*ROWS[:2], {"messages": ROWS[2]["messages"][:1]}, *ROWS[3:5]])
    options: dict[str, Any] = {"max_seq_len": 64, "on_overlong": "error", "cache_root": tmp_path}
    with pytest.raises(
        ValueError, match=f"1 problem in the data:\n.*{re.escape(third)}: .*no assist"
    ):
        prepare(tmp_path / name, tiny.tokenizer(), **options)
    rest = prepare(tmp_path / name, tiny.tokenizer(), on_bad_sample="skip", **options)
    assert (rest.counts.samples, rest.counts.skipped_bad) == (4, 1)


@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
def test_an_array_is_read_in_pieces_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    rows = [{"é": '"\\u00e9\\"]', "n": [1.5e3, None, True, {"": []}]}, 123, "x\n", {}, -1, [], "12"]
    path = tmp_path / "d.json"
    path.write_text(f" {json.dumps(rows, indent=2)} \n")
    monkeypatch.setattr(json_rows, "_CHUNK_CHARACTERS", pieces)
    read = list(read_rows(find_data_files(path).files, Faults()))
    assert [row.value for row in read] == rows
    lines = [2, 13, 14, 15, 16, 17, 18]
    assert [row.place for row in read] == [
        f"d.json, line {line} (element {number})" for number, line in enumerate(lines, start=1)
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2, {'a': 1}, 4]", r"line 1 \(after element 2\): not JSON, .*Expecting property name"),
        ("[1,\n2,\r\n {\n'a': 1}, 4]", r"line 4 \(after element 2\): .*Expecting property name"),
        ("[1, 2\n", r"line 2 \(after element 2\): .*']' is missing"),
        ("[1 2]", r"line 1 \(after element 1\): .*']' is missing"),
        ("[1]\n\n2", r"line 3 \(after element 1\): .*more text behind the array"),
        ("[", r"line 1 \(its beginning\): not JSON, the rest of the file cannot be read"),
        ("[" * 100_000, r"line 1 \(its beginning\): .*not JSON"),
        (f"[1,\n{BEYOND}, 3]", r"line 2 \(after element 1\): .*Exceeds the limit .* 5000 digits$"),
    ],
)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_an_array_that_is_broken_is_an_error_in_either_mode(
    tmp_path: Path, text: str, words: str, mode: Any
) -> None:
    """Nobody can tell where the next element begins: skipping would lose the rest silently."""
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"data_path: d\.json, {words}"):
        values_of(path, Faults(mode))


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    for name in ("d.parquet", "d.arrow"):
        (tmp_path / name).write_bytes(b"no table at all")
        with pytest.raises(ValueError, match=f"data_path: {name} cannot be read: "):
            values_of(tmp_path / name)


def flipped(path: Path, where: slice) -> None:
    """Turn every bit of some bytes, as a bad disk or a broken copy may."""
    content = bytearray(path.read_bytes())
    content[where] = bytes(byte ^ 0xFF for byte in content[where])
    path.write_bytes(content)


def footer(path: Path) -> slice:
    """Where Parquet says what is in the file; its length stands before the last four bytes."""
    length = int.from_bytes(path.read_bytes()[-8:-4], "little")
    return slice(-8 - length, -8 - length + 30)


def doubled(path: Path) -> None:
    path.write_bytes(2 * path.read_bytes())


def second_batch(path: Path) -> int:
    """Where the second batch of a stream begins."""
    with arrow.OSFile(str(path)) as source:
        messages = ipc.MessageReader.open_stream(source)
        for _ in ("schema", "first batch"):
            messages.read_next_message()
        place: int = source.tell()
    return place


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "header of a Parquet page": ("d.parquet", lambda path: flipped(path, slice(4, 24))),
    "page of Parquet": ("d.parquet", lambda path: flipped(path, slice(60, 120))),
    "footer of Parquet": ("d.parquet", lambda path: flipped(path, footer(path))),
    "end of a file of Arrow": ("d.arrow", lambda path: os.truncate(path, 3000)),
    "end of a stream of Arrow": ("stream.arrow", lambda path: os.truncate(path, 3000)),
    "stream of Arrow between two batches": (
        "stream.arrow",
        lambda path: os.truncate(path, second_batch(path)),
    ),
    "end mark of a stream of Arrow": (
        "stream.arrow",
        lambda path: os.truncate(path, path.stat().st_size - 8),
    ),
    "one stream of Arrow behind another": ("stream.arrow", doubled),
    "lengths in Arrow": ("stream.arrow", lambda path: flipped(path, slice(1700, 1800))),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_table_that_is_damaged_within_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write = next(write for kind, write, _ in KINDS if kind == name)
    write(tmp_path / name, ROWS)
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=f"data_path: {re.escape(name)} cannot be read: .*again"):
        values_of(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_disk_that_fails_is_no_damaged_table(tmp_path: Path) -> None:
    """It may pass, so it must not be taken for bad input."""
    (tmp_path / "d.arrow").symlink_to("/proc/self/mem")  # whose first bytes nobody can read
    with pytest.raises(OSError, match="Input/output error") as caught:
        values_of(tmp_path / "d.arrow")
    assert caught.value.errno == errno.EIO
    with pytest.raises(FileNotFoundError):
        list(read_rows([DataFile(tmp_path / "gone.parquet", "gone.parquet", "parquet")], Faults()))


def test_a_number_beyond_the_parser_is_a_fault_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(f"1\n{BEYOND}\n")
    faults = Faults()
    assert values_of(tmp_path / "d.jsonl", faults) == [1]
    (fault,) = faults.found
    assert re.search(r"d\.jsonl, line 2: not JSON .*Exceeds the limit .* 5000 digits$", fault)


def test_without_pyarrow_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "d.parquet", ROWS)

    def lacking(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tables.importlib, "import_module", lacking)
    with pytest.raises(
        ValueError, match=r"d\.parquet needs the package pyarrow: pip install 'osft\[data\]'"
    ):
        values_of(tmp_path / "d.parquet")


def test_keys_that_a_row_of_a_table_lacks_are_left_out(tmp_path: Path) -> None:
    """Columns give every row all keys; a template asks whether a key is there."""
    calls = [{"function": {"name": "f", "arguments": {"city": "Paris"}}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": calls},
            ],
            "ids": [1, 2],
        },
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    write_parquet(tmp_path / "d.parquet", rows)
    assert values_of(tmp_path / "d.parquet") == rows


def test_a_saved_dataset_is_read_by_what_it_lists(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"what a map has left here")
    files = find_data_files(tmp_path / "saved").files
    assert [file.name for file in files] == [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    assert [row.value for row in read_rows(files, Faults())] == ROWS
    files[1].path.unlink()
    with pytest.raises(ValueError, match=r"without data-00001-of-00003\.arrow: copy it whole"):
        find_data_files(tmp_path / "saved")


def test_a_saved_dataset_with_splits_is_named_down_to_the_split(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "one")
    assert values_of(tmp_path / "one") == ROWS
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"several splits: give one of them: .*two/train, .*two/test"
    ):
        find_data_files(tmp_path / "two")
    assert len(find_data_files(tmp_path / "two" / "test").files) == 1


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: arrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize(("name", "write"), [("d.jsonl", write_jsonl), ("d.json", write_json)])
def test_compressed_files_give_the_same_rows_or_an_error(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None], suffix: str
) -> None:
    """A file that was cut off, or is damaged, never ends as a shorter one."""
    write(tmp_path / name, ROWS)
    content = COMPRESSED[suffix]((tmp_path / name).read_bytes())
    path = tmp_path / f"{name}{suffix.upper()}"
    path.write_bytes(content)
    assert values_of(path) == ROWS
    for damaged in (content[:-9], content[: len(content) // 2], content[:4]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} cannot be decompressed: .*again"):
            values_of(path)


def test_without_pyarrow_zstandard_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"d\.jsonl\.zst needs the package pyarrow: .*gzip"):
        values_of(tmp_path / "d.jsonl.zst")


TEXT = datasets.Value("string")
MESSAGE = {"role": TEXT, "content": TEXT}
FORMS: dict[str, Any] = {
    "list": datasets.List(MESSAGE),
    "large list": datasets.LargeList(MESSAGE),
    "object of lists": {"role": datasets.List(TEXT), "content": datasets.List(TEXT)},
    "list of JSON": datasets.List(datasets.Json()),
    "JSON": datasets.Json(),
    "text of JSON": TEXT,
    "classes": datasets.List(
        {"role": datasets.ClassLabel(names=["system", "user", "assistant"]), "content": TEXT}
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", ["save_to_disk", "parquet"])
def test_messages_are_read_from_any_feature_that_holds_them(
    tmp_path: Path, form: str, stored: str
) -> None:
    messages = ROWS[0]["messages"]
    value = messages
    if form == "object of lists":
        value = {key: [message[key] for message in messages] for key in MESSAGE}
    elif form == "text of JSON":
        value = json.dumps(messages)
    features = datasets.Features({"messages": FORMS[form]})
    data = datasets.Dataset.from_dict({"messages": [value]}, features=features)
    if stored == "parquet":
        data.to_parquet(tmp_path / "d.parquet")
    else:
        data.save_to_disk(tmp_path / "saved")
    path = tmp_path / ("d.parquet" if stored == "parquet" else "saved")
    (row,) = values_of(path)
    assert conversation(row).messages == messages


def test_a_sequence_of_older_datasets_is_a_list_again() -> None:
    """They kept a list of objects as an object of lists, and said so beside the data."""
    feature = {"feature": {"a": {"dtype": "int64", "_type": "Value"}}, "_type": "Sequence"}
    metadata = {b"huggingface": json.dumps({"info": {"features": {"calls": feature}}}).encode()}
    decode = row_decoder(metadata)
    assert decode is not None
    assert decode({"calls": {"a": [1, 2]}, "b": 3}) == {"calls": [{"a": 1}, {"a": 2}], "b": 3}
    assert decode({"calls": None}) == {"calls": None}
    for foreign in (None, {}, {b"huggingface": b"{"}, {b"huggingface": b"[]"}):
        assert row_decoder(foreign) is None


@pytest.mark.parametrize(
    ("name", "write", "_"), KINDS[:3] + KINDS[4:], ids=[kind[0] for kind in KINDS[:3] + KINDS[4:]]
)
def test_reading_holds_a_few_rows_only(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None], _: str
) -> None:
    """Sixteen times the rows, and no more memory."""

    def peak(count: int) -> int:
        path = tmp_path / f"{count}-{name}"
        write(path, [{"text": f"{number} " * 2000} for number in range(count)])
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_rows([DataFile.named(path)], Faults())) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(3200) < 1.5 * peak(200) + 3_000_000

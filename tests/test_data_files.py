"""What a data path stands for: nothing that looks like data is passed over without a word."""

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

import tiny
from osft_trainer.data import prepare
from osft_trainer.data_files import find_data_files
from osft_trainer.identity import data_digest
from osft_trainer.planning import make_report

ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def write(path: Path, text: str = ROW) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(path: Path | str) -> list[str]:
    return [file.name for file in find_data_files(path).files]


def test_a_folder_gives_its_files_of_one_kind_in_order(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "notes.txt", ".hidden.parquet"):
        parquet.write_table(arrow.Table.from_pylist([json.loads(ROW)]), tmp_path / name)
    found = find_data_files(tmp_path)
    assert [file.name for file in found.files] == ["a.parquet", "b.parquet"]
    assert found.not_read == {"notes.txt": "no kind of data file that is known"}
    write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"holds \*\.jsonl and \*\.parquet.*leave one kind"):
        find_data_files(tmp_path)


def test_a_folder_gives_all_that_lies_below_it_in_any_spelling(tmp_path: Path) -> None:
    read = ["B.JSONL", "a.jsonl", "b.ndjson", "c.jsonl.gz", "more/b.jsonl", "part-00001",
            "part-00002-7f.c000"]  # fmt: skip
    passed = ["README.md", "_SUCCESS", "dataset_info.json", "notes.txt", "run/metrics.jsonl",
              "base/tokens.jsonl"]  # fmt: skip
    for name in read:
        write(tmp_path / name)
    for name in passed:
        write(tmp_path / name, "words\n")
    write(tmp_path / "run" / "OWNER")
    write(tmp_path / "base" / "model.safetensors")
    write(tmp_path / ".cache" / "hidden.jsonl")
    found = find_data_files(tmp_path)
    assert [file.name for file in found.files] == read
    assert set(found.not_read) == {*passed[:4], "run/", "base/"}
    text = "\n".join(found.to_lines())
    assert all(name in text for name in (*read, *found.not_read))
    assert found.to_json()["fileCount"] == len(read)


def test_a_mounted_config_map_is_read_once(tmp_path: Path) -> None:
    """The kubelet mounts its files as links into a hidden folder, which is a link itself."""
    write(tmp_path / "..2026" / "a.jsonl")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "a.jsonl").symlink_to("..data/a.jsonl")
    assert names(tmp_path) == ["a.jsonl"]


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    write(tmp_path / "more" / "a.jsonl")
    (tmp_path / "more" / "up").symlink_to(tmp_path)
    found = find_data_files(tmp_path)
    assert [file.name for file in found.files] == ["more/a.jsonl"]
    assert set(found.not_read) == {"more/up/"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.csv", "csv is not read here: write its rows as JSON Lines"),
        ("d.CSV.gz", "csv is not read here: write its rows as JSON Lines"),
        ("d.xlsx", "JSON Lines"),
        ("d.pkl", "JSON Lines"),
        ("d.zip", "unpack it"),
        ("d.tar.gz", "unpack it"),
        ("d.jsonl.lz4", "unpack it"),
        ("d.parquet.gz", "a compressed parquet file is not read here: unpack it"),
    ],
)
def test_what_looks_like_data_and_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, words: str
) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / name)
    for given in (tmp_path, tmp_path / name, tmp_path / "*"):
        with pytest.raises(ValueError, match=f"data_path .*{words}"):
            find_data_files(given)
    assert names(tmp_path / "*.jsonl") == ["a.jsonl"]


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl: a link to gone\.jsonl, which does not exist"):
        find_data_files(tmp_path)


@pytest.mark.parametrize("twin", ["a.jsonl.gz", "a.ndjson"])
def test_what_seems_to_be_there_twice_is_an_error(tmp_path: Path, twin: str) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / twin)
    with pytest.raises(ValueError, match=r"holds a\.\w+ and a\..*, perhaps the same data twice"):
        find_data_files(tmp_path)


@pytest.mark.parametrize(
    ("train", "other"),
    [
        (["train-0.jsonl", "train-1.jsonl"], "test-0.jsonl"),
        (["train/a.jsonl", "train/b.jsonl"], "validation/a.jsonl"),
        (["x_train_0.jsonl", "x_train_1.jsonl"], "x_dev.jsonl"),
        (["data/train-0.jsonl", "data/train-1.jsonl"], "data/eval.jsonl"),
        (["data/train-0.jsonl", "data/train-1.jsonl"], "more/test/train.jsonl"),
    ],
)
def test_splits_are_told_apart(tmp_path: Path, train: list[str], other: str) -> None:
    for name in (*train, other):
        write(tmp_path / name)
    with pytest.raises(ValueError, match="several splits: give one of them: ") as refusal:
        find_data_files(tmp_path)
    # Each way out that it names is one.
    ways = [word for word in str(refusal.value).split("'")[3::2]]
    assert [len(names(way)) for way in ways] == [2, 1, 3]
    assert {file.path for file in find_data_files(ways[0]).files} == {tmp_path / n for n in train}


def test_names_that_only_remind_of_a_split_are_none(tmp_path: Path) -> None:
    for name in ("latest.jsonl", "contest.jsonl", "training_notes.jsonl", "devices.jsonl"):
        write(tmp_path / name)
    assert len(names(tmp_path)) == 4


def test_a_pattern_gives_what_it_matches(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.jsonl", "more/d.jsonl", "notes.md"):
        write(tmp_path / name)
    assert names(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path / "**" / "*.jsonl") == ["c.jsonl", "more/d.jsonl"]
    found = find_data_files(f"{tmp_path}/*")
    assert [file.name for file in found.files] == ["c.jsonl"]
    assert set(found.not_read) == {"a.txt", "b.txt", "notes.md", "more/"}
    with pytest.raises(ValueError, match="matches no file"):
        find_data_files(tmp_path / "*.parquet")
    with pytest.raises(ValueError, match="does not exist: give a file, a folder"):
        find_data_files(tmp_path / "gone.jsonl")
    write(tmp_path / "e[1].jsonl")
    assert names(tmp_path / "e[1].jsonl") == ["e[1].jsonl"]


def test_a_digest_covers_all_that_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    before = data_digest(tmp_path)
    write(tmp_path / "notes.md")
    assert data_digest(tmp_path) == before
    write(tmp_path / "more" / "b.jsonl")
    assert data_digest(tmp_path) != before
    with pytest.raises(ValueError, match=r"retention_data_path '.*gone' does not exist"):
        data_digest(tmp_path / "gone", "retention_data_path")


def test_log_and_plan_name_what_is_read_and_what_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "given"
    write(data / "a.jsonl", 4 * ROW)
    write(data / "more" / "b.ndjson", 4 * ROW)
    write(data / "notes.md")
    base = tiny.model_folder(tmp_path / "base")
    with caplog.at_level("INFO"):
        prepared = prepare(
            data, tiny.tokenizer(), max_seq_len=64, on_overlong="error", cache_root=data
        )
    assert prepared.counts.rows == 8
    assert "files read: a.jsonl, more/b.ndjson" in caplog.text
    assert "files not read: notes.md (no kind of data file that is known)" in caplog.text
    training = tiny.training(base, data, tmp_path / "run")
    report = make_report(training, processes=1, device="cpu", energy=False)
    assert "files read: a.jsonl, more/b.ndjson" in report.to_text()
    assert json.loads(report.to_json())["dataFiles"]["notRead"].keys() >= {"notes.md"}

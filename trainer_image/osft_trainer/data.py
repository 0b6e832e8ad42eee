"""Preparing training data: from files to the cache folder `<cache_root>/data/<digest>/`, once.

Lives here: the digest that names the folder, the stream of samples into the arrays, what happens to
overlong and empty samples, and the atomic finish. The folder's form is in `prepared`.
Called by the training loop: one process runs `prepare`, the others `open_prepared` after a
barrier. Must never: hold the data set in memory, leave a folder that looks complete and is not,
or drop a sample without counting it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from osft_trainer.base_model import stop_token_ids
from osft_trainer.config import TrainingParameters
from osft_trainer.data_files import find_data_files
from osft_trainer.durable import is_full, sync, told
from osft_trainer.faults import Faults, OnBadSample
from osft_trainer.file_kinds import DataFile
from osft_trainer.leftovers import WRITING, remove_leftovers, written_folder
from osft_trainer.masking import MaskedTokens
from osft_trainer.prepared import DataCounts, PreparedData, PreparedWriter, open_prepared
from osft_trainer.samples import Chat, Documents, Form, Placed, Processed
from osft_trainer.sources import read_rows

__all__ = [
    "DataCounts",
    "Overlong",
    "PreparedData",
    "chat_of",
    "form_of",
    "open_prepared",
    "prepare",
]

FORMAT_VERSION = 4
"""Part of the digest: raise it when the mask or the files change."""

CHAT = Chat()

Overlong = Literal["error", "drop", "truncate"]

logger = logging.getLogger(__name__)


def prepare(
    data_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    on_overlong: Overlong,
    cache_root: str | Path,
    on_bad_sample: OnBadSample = "error",
    form: Form = CHAT,
) -> PreparedData:
    """Tokenise and mask the data into `<cache_root>/data/<digest>/`, or open what is there.

    For one process at a time; a second one at the same moment does the work twice, no harm. What
    killed ones have left is removed.

    Args:
        data_path: a file, or a folder of files.
        tokenizer: the base model's.
        max_seq_len: longest sample in tokens.
        on_overlong: what becomes of longer ones.
        cache_root: where prepared data are kept by digest.
        on_bad_sample: what becomes of rows that cannot be used.
        form: what a row holds.

    Raises:
        ValueError: the data, the path or the tokenizer cannot be used; names file, line, reason.
    """
    found = find_data_files(data_path)
    for line in found.to_lines():
        logger.info("%s: %s", data_path, line)
    files = found.files
    digest = _digest(
        files,
        tokenizer,
        {
            "max_seq_len": max_seq_len,
            "on_overlong": on_overlong,
            "on_bad_sample": on_bad_sample,
            "form": _described(form),
        },
    )
    root = Path(cache_root) / "data"
    folder = root / digest
    remove_leftovers(root, ".")
    if (folder / "COMPLETE").is_file():
        try:
            return open_prepared(folder)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            # The user's data are not at fault, and the folder can be had again.
            logger.warning("prepared data %s is damaged and is made anew: %s", folder, error)
            shutil.rmtree(folder)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with written_folder(root, f".{digest}-") as work:
            faults = Faults(on_bad_sample)
            samples = form.samples(read_rows(files, faults), tokenizer, faults)
            counts, largest_id = _write(work, samples, faults, max_seq_len, on_overlong)
            if not counts.samples:
                raise ValueError(
                    f"data_path {str(data_path)!r} leaves nothing to train on: {counts}"
                )
            meta = {"digest": digest, "format": FORMAT_VERSION, "counts": asdict(counts)}
            _finish(work, folder, {**meta, "largest_id": largest_id})
    except OSError as error:
        if not is_full(error):
            raise
        raise OSError(f"{root}: {told(error)}") from error
    logger.info("prepared %s: %s", data_path, counts)
    return open_prepared(folder)


def form_of(training: TrainingParameters) -> Form:
    """What a row of the training data holds."""
    if training.is_pretraining:
        assert training.block_size is not None, "checked by TrainingParameters"
        return Documents(training.block_size, training.document_column_name)
    if training.use_processed_dataset:
        return Processed()
    return chat_of(training, training.unmask_messages)


def chat_of(training: TrainingParameters, unmask: bool = False) -> Chat:
    """Conversations as the model that is trained writes and ends them."""
    return Chat(unmask, stop_token_ids(training.model_path), training.on_missing_eos)


def _described(form: Form) -> list[Any]:
    assert is_dataclass(form)
    assert not isinstance(form, type)
    return [type(form).__name__, asdict(form)]


def _digest(
    files: Sequence[DataFile], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> str:
    """Name of the folder: everything that decides its content, and nothing else (no file names)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    deciding = {
        **options,
        "format": FORMAT_VERSION,
        "kinds": [file.path.suffix for file in files],
        "tokenizer": backend.to_str() if backend is not None else repr(tokenizer),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    hasher = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for file in files:
        with file.path.open("rb") as stream:
            hasher.update(hashlib.file_digest(stream, "sha256").digest())
    return hasher.hexdigest()[:32]


def _write(
    work: Path, samples: Iterable[Placed], faults: Faults, max_seq_len: int, on_overlong: Overlong
) -> tuple[DataCounts, int]:
    """Stream the samples into the arrays of `work`; gives the largest token id, too."""
    counts = DataCounts()
    with PreparedWriter(work) as writer:
        for placed in samples:
            fitted, counts = _fit(placed, max_seq_len, on_overlong, counts, faults)
            if fitted is None or faults.found:
                continue  # with a fault nothing will be trained, so nothing more is written
            targets = writer.append(fitted.input_ids, fitted.loss_mask, fitted.lengths)
            counts = replace(
                counts,
                samples=counts.samples + 1,
                tokens=counts.tokens + len(fitted.input_ids),
                loss_tokens=counts.loss_tokens + targets,
            )
    faults.raise_if_any()
    counts = replace(counts, rows=faults.rows - faults.skipped, skipped_bad=faults.skipped)
    return counts, writer.largest_id


def _fit(
    placed: Placed,
    max_seq_len: int,
    on_overlong: Overlong,
    counts: DataCounts,
    faults: Faults,
) -> tuple[MaskedTokens | None, DataCounts]:
    """The sample as it is trained, or None; and what was done to it, counted."""
    tokens = placed.tokens
    length = len(tokens.input_ids)
    overlong = length > max_seq_len
    if overlong and on_overlong == "error":
        faults.add(
            placed.place,
            f"{length} tokens are more than max_seq_len {max_seq_len}: shorten it, raise "
            "max_seq_len, or set on_overlong to drop or truncate",
        )
        return None, counts
    if overlong and on_overlong == "drop":
        return None, replace(counts, dropped_overlong=counts.dropped_overlong + 1)
    kept = tokens
    if overlong:
        kept = MaskedTokens(tokens.input_ids[:max_seq_len], tokens.loss_mask[:max_seq_len])
    if not kept.loss_mask.any():
        return None, replace(counts, dropped_empty=counts.dropped_empty + 1)
    return kept, replace(counts, truncated=counts.truncated + overlong)


def _finish(work: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Make `work` durable, mark it, and give it its name; whoever came first is kept."""
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (work / "COMPLETE").touch()
    work.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared cache
    for path in [*work.iterdir(), work]:
        sync(path)
    if folder.exists() and not (folder / "COMPLETE").is_file():
        shutil.rmtree(folder)
    try:
        work.rename(folder)
    except OSError:
        if not (folder / "COMPLETE").is_file():
            raise
    (folder / WRITING).unlink(missing_ok=True)
    sync(folder.parent)

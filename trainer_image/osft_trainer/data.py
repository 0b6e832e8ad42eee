"""Preparing training data: from JSONL to the cache folder `<cache_root>/data/<digest>/`, once.

Lives here: the digest that names the folder, the stream through masking into the arrays, what
happens to overlong and empty samples, and the atomic finish. The folder's form is in `prepared`.
Called by the training loop: one process runs `prepare`, the others `open_prepared` after a
barrier. Must never: hold the data set in memory, leave a folder that looks complete and is not,
or drop a sample without counting it.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from osft_trainer.conversations import Conversation, Faults, data_files, read_conversations
from osft_trainer.masking import ChatMasker, MaskedText, MaskedTokens
from osft_trainer.prepared import DataCounts, GrowingArray, PreparedData, open_prepared

__all__ = ["DataCounts", "Overlong", "PreparedData", "open_prepared", "prepare"]

FORMAT_VERSION = 1
"""Part of the digest: raise it when the mask or the files change."""

CONVERSATIONS_AT_ONCE = 64
"""Tokenised together: enough for the tokenizer's threads, little enough for any memory."""

Overlong = Literal["error", "drop", "truncate"]

logger = logging.getLogger(__name__)


def prepare(
    data_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    on_overlong: Overlong,
    cache_root: str | Path,
) -> PreparedData:
    """Tokenise and mask the data into `<cache_root>/data/<digest>/`, or open what is there.

    For one process at a time; a second one at the same moment does the work twice, no harm.

    Raises:
        ValueError: the data, the path or the tokenizer cannot be used; names file, line, reason.
    """
    files = data_files(data_path)
    digest = _digest(files, tokenizer, max_seq_len, on_overlong)
    root = Path(cache_root) / "data"
    folder = root / digest
    if (folder / "COMPLETE").is_file():
        try:
            return open_prepared(folder)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            # The user's data are not at fault, and the folder can be had again.
            logger.warning("prepared data %s is damaged and is made anew: %s", folder, error)
            shutil.rmtree(folder)
    masker = ChatMasker(tokenizer)
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=root))
    try:
        counts = _write(work, files, masker, max_seq_len, on_overlong)
        if not counts.samples:
            raise ValueError(f"data_path {str(data_path)!r} leaves nothing to train on: {counts}")
        _finish(
            work, folder, {"digest": digest, "format": FORMAT_VERSION, "counts": asdict(counts)}
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("prepared %s: %s", data_path, counts)
    return open_prepared(folder)


def _digest(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, max_seq_len: int, on_overlong: str
) -> str:
    """Name of the folder: everything that decides its content, and nothing else (no file names)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    options = {
        "format": FORMAT_VERSION,
        "max_seq_len": max_seq_len,
        "on_overlong": on_overlong,
        "tokenizer": backend.to_str() if backend is not None else repr(tokenizer),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    hasher = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            hasher.update(hashlib.file_digest(stream, "sha256").digest())
    return hasher.hexdigest()[:32]


def _write(
    work: Path, files: Sequence[Path], masker: ChatMasker, max_seq_len: int, on_overlong: Overlong
) -> DataCounts:
    """Stream every file through the tokenizer into the arrays of `work`."""
    faults = Faults()
    counts = DataCounts()
    warned = False
    with (
        GrowingArray(work / "input_ids.npy", "<i4") as ids,
        GrowingArray(work / "loss_mask.npy", "|b1") as mask,
        GrowingArray(work / "offsets.npy", "<i8") as offsets,
        GrowingArray(work / "loss_counts.npy", "<i4") as loss_counts,
    ):
        offsets.append([0])
        for group in _grouped(read_conversations(files, faults), CONVERSATIONS_AT_ONCE):
            places, texts = _render(group, masker, faults)
            if not warned and not all(text.has_turn_end for text in texts):
                warned = True
                logger.warning(
                    "the chat template writes no token at the end of an assistant turn: the model "
                    "will not learn from this data where to stop"
                )
            for place, tokens in zip(places, masker.tokenize(texts), strict=True):
                fitted, counts = _fit(tokens, place, max_seq_len, on_overlong, counts, faults)
                if fitted is None:
                    continue
                targets = int(fitted.loss_mask.sum())
                counts = replace(
                    counts,
                    samples=counts.samples + 1,
                    tokens=counts.tokens + len(fitted.input_ids),
                    loss_tokens=counts.loss_tokens + targets,
                )
                ids.append(fitted.input_ids)
                mask.append(fitted.loss_mask)
                offsets.append([counts.tokens])
                loss_counts.append([targets])
            counts = replace(counts, conversations=counts.conversations + len(group))
        faults.raise_if_any()
    return counts


def _render(
    group: Sequence[Conversation], masker: ChatMasker, faults: Faults
) -> tuple[list[str], list[MaskedText]]:
    """Every text of the group with the place it came from; refusals of the template are faults."""
    places: list[str] = []
    texts: list[MaskedText] = []
    for conversation in group:
        try:
            rendered = masker.texts(conversation.messages, conversation.tools)
        except ValueError as error:
            faults.add(conversation.place, str(error))
            continue
        texts += rendered
        places += [conversation.place] * len(rendered)
    return places, texts


def _fit(
    tokens: MaskedTokens,
    place: str,
    max_seq_len: int,
    on_overlong: Overlong,
    counts: DataCounts,
    faults: Faults,
) -> tuple[MaskedTokens | None, DataCounts]:
    """The sample as it is trained, or None; and what was done to it, counted."""
    length = len(tokens.input_ids)
    overlong = length > max_seq_len
    if overlong and on_overlong == "error":
        faults.add(
            place,
            f"{length} tokens are more than max_seq_len {max_seq_len}: shorten it, raise "
            "max_seq_len, or set on_overlong to drop or truncate",
        )
        return None, counts
    if overlong and on_overlong == "drop":
        return None, replace(counts, dropped_overlong=counts.dropped_overlong + 1)
    kept = MaskedTokens(tokens.input_ids[:max_seq_len], tokens.loss_mask[:max_seq_len])
    if not kept.loss_mask.any():
        return None, replace(counts, dropped_empty=counts.dropped_empty + 1)
    return kept, replace(counts, truncated=counts.truncated + overlong)


def _grouped(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _finish(work: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Make `work` durable, mark it, and give it its name; whoever came first is kept."""
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (work / "COMPLETE").touch()
    work.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared cache
    for path in [*work.iterdir(), work]:
        _sync(path)
    if folder.exists() and not (folder / "COMPLETE").is_file():
        shutil.rmtree(folder)
    try:
        work.rename(folder)
    except OSError:
        if not (folder / "COMPLETE").is_file():
            raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

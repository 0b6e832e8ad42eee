"""The base models of the retention benchmark, the text that each writes, and chats as tokens.

Used by `retention_training`. Every seed has a base model of its own: what two of them keep differs
by more than what two orders of the same samples do. Nothing here trains a method.
"""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path

import pretrain
import skills
import torch
from retention_tasks import NEW, OLD, Task
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from osft_trainer.self_sampling import sample_conversations

PRETRAINING_STEPS, HELD_OUT = 700, 128
TEXT_SAMPLES = 12 * 96
"""Samples of old text that a method may read: twelve batches of the pre-training."""


def prepare(folder: Path, seeds: Sequence[int], processes: int) -> None:
    """Train the base models that the folder lacks; each writes its own text."""
    missing = [seed for seed in seeds if not (_place(folder, seed) / "own.jsonl").is_file()]
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        pool.starmap(_prepare, [(folder, seed) for seed in missing])


def _prepare(folder: Path, seed: int) -> None:
    place = _place(folder, seed)
    if not place.is_dir():
        names = [task.name for task in OLD]
        pretrain.pretrain(place, names, steps=PRETRAINING_STEPS, seed=seed, whole_text=True)
    base = Base(folder, seed)
    lines = sample_conversations(
        base.model(), base.tokenizer, tokens=TEXT_SAMPLES * 17, max_seq_len=40, seed=seed
    )
    written = "".join(json.dumps(line) + "\n" for line in lines)
    # Its existence says that the base is ready.
    (place / "own.part").write_text(written, encoding="utf-8")
    (place / "own.part").rename(place / "own.jsonl")
    print(f"  base model {seed} is ready", flush=True)


def _place(folder: Path, seed: int) -> Path:
    return folder / f"base-{seed}"


class Base:
    """One base model and its texts, as every process of the benchmark has them."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Open what `prepare` has left in the folder."""
        self._place = _place(folder, seed)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._place)
        self.tokenizer = AutoTokenizer.from_pretrained(self._place)

    def model(self) -> PreTrainedModel:
        """A copy to train."""
        return copy.deepcopy(self._model)

    def tokens(self, chats: Iterable[dict]) -> Tensor:
        """[chats, T] token numbers; chats of one task have one length."""
        return pretrain.encode(self.tokenizer, list(chats))

    def old_text(self, lacks: str | None) -> list[Tensor]:
        """Text of the old skills, but for one: [chats, T], as a list of one."""
        held = [task for task in OLD if task.name != lacks]
        each = TEXT_SAMPLES // len(held)
        return [self.tokens([chat for task in held for chat in task.samples(each, "retention")])]

    def own_text(self) -> list[Tensor]:
        """What the model wrote itself, [chats, T] for each length.

        What it writes is not always as long as what it learned.
        """
        by_length: dict[int, list[dict]] = {}
        with (self._place / "own.jsonl").open(encoding="utf-8") as lines:
            for chat in map(json.loads, lines):
                by_length.setdefault(self.tokens([chat]).shape[1], []).append(chat)
        return [self.tokens(by_length[length]) for length in sorted(by_length)]

    def before(self) -> dict[str, float]:
        """What the base model answers of everything, old and new."""
        return {task.name: self.score(self._model, task) for task in [*OLD, *NEW.values()]}

    @torch.no_grad()
    def score(self, hf: nn.Module, task: Task) -> float:
        """Share of held-out questions whose every answer token is the most likely one.

        Given the right beginning, each token of the answer must come first: that is the same as
        answering exactly when decoding greedily.
        """
        hf.eval()
        tokens = self.samples(task, HELD_OUT, "held out")
        wanted = answers_only(tokens)[:, 1:]
        found = hf(input_ids=tokens).logits[:, :-1].argmax(-1)
        hf.train()
        return float(((found == wanted) | (wanted == -100)).all(1).float().mean())

    @functools.cache  # noqa: B019  # trainings ask for the same again; a process has few bases
    def samples(self, task: Task, count: int, seed: str) -> Tensor:
        """[count, T] tokens of chats of a task."""
        return self.tokens(task.samples(count, seed))


def answers_only(tokens: Tensor) -> Tensor:
    """Labels of the answer and its end."""
    labels = tokens.clone()
    labels[:, : -(skills.LENGTH + 1)] = -100
    return labels

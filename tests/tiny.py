"""A tiny model, tokenizer and data set on disk, and training runs of them as real processes.

Processes come from a fork server that has imported torch once, so that a run takes about a second.
"""

from __future__ import annotations

import errno
import faulthandler
import functools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from osft_trainer import checkpoint, shards
from osft_trainer.agreement import any_rank, from_first_rank
from osft_trainer.arguments import TrainerArguments
from osft_trainer.config import LaunchParameters, RunParameters, TrainingParameters
from osft_trainer.export import base_digest
from osft_trainer.identity import Claim, claim, contents_of, fingerprint
from osft_trainer.outcome import Diverged, Preempted, Superseded, TrainResult
from osft_trainer.parallel import start_world, stop_world
from osft_trainer.progress import Reporter
from osft_trainer.report import RunFolder, metric_lines
from osft_trainer.train import train

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
RUN_ID = "tiny-run"

_CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def _start_fork_server() -> None:
    """Start it with this module imported; Python 3.11 gives it no sys.path to find it by."""
    _CONTEXT.set_forkserver_preload(["tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template with an end of turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<u>", "<a>", "<t>", "<e>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", chat_template=TEMPLATE
    )


def model_folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with its tokenizer, as a Hugging Face folder."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokens),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "eos_token_id": tokens.eos_token_id,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokens.save_pretrained(path)
    return path


def data_file(
    path: Path,
    conversations: int = 22,
    seed: int = 0,
    letters: str = "abcdef",
    task: str = "reverse",
) -> Path:
    """JSONL: reverse a word. The words differ in length, so that packing has something to do."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(conversations):
            word = "".join(draw.choices(letters, k=draw.randint(2, 14)))
            turns = [
                {"role": "user", "content": f"{task} {word}"},
                {"role": "assistant", "content": word[::-1]},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def training(model: Path, data: Path, out: Path, **changes: Any) -> TrainingParameters:
    """Parameters of a run of six optimizer steps (two epochs of three), with several rounds."""
    return TrainingParameters(
        **{
            "model_path": str(model),
            "data_path": str(data),
            "ckpt_output_dir": str(out),
            "unfreeze_rank_ratio": 0.5,
            "effective_batch_size": 8,
            "max_tokens_per_gpu": 96,
            "max_seq_len": 64,
            "learning_rate": 0.01,
            "num_epochs": None if "training_mode" in changes else 2,
            "weight_decay": 0.1,
            **changes,
        }
    )


def arguments(model: Path, data: Path, out: Path, **changes: Any) -> TrainerArguments:
    """The same as everything one trainer process is told."""
    return TrainerArguments(training(model, data, out, **changes), RunParameters(run_id=RUN_ID))


def argv(model: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """The same as command line arguments; keys of LaunchParameters may be among the changes."""
    launch = {k: changes.pop(k) for k in list(changes) if k in LaunchParameters.model_fields}
    told = arguments(model, data, out, **changes)
    return TrainerArguments(told.training, told.run, LaunchParameters(**launch)).to_argv()


def run(parameters: TrainingParameters, stop: threading.Event | None = None) -> TrainResult:
    """Train as one rank of the world that the environment names; here and now."""
    folder = RunFolder(Path(parameters.ckpt_output_dir))
    folder.root.mkdir(parents=True, exist_ok=True)
    world = start_world("cpu")

    def on_first_rank() -> str:
        contents = contents_of(parameters, base_digest(parameters.model_path))
        prints = fingerprint(parameters, contents)
        return json.dumps(asdict(claim(folder, RunParameters(run_id=RUN_ID), prints)))

    ours = Claim(**json.loads(from_first_rank(world, on_first_rank)))
    reporter = Reporter(folder, RUN_ID, 1, world.rank)
    try:
        return train(
            TrainerArguments(parameters, RunParameters(run_id=RUN_ID)),
            folder=folder,
            claim=ours,
            reporter=reporter,
            stop=stop or threading.Event(),
            world=world,
        )
    finally:
        reporter.close()
        stop_world(world)


def rows(parameters: TrainingParameters) -> list[dict[str, float]]:
    """metrics.jsonl without what differs between any two runs."""
    found = metric_lines(RunFolder(Path(parameters.ckpt_output_dir)).metrics)
    timing = {"seconds", "timestamp", "tokensPerSecond"}
    return [{k: v for k, v in row.items() if k not in timing} for row in found]


def start(
    parameters: TrainingParameters,
    ranks: int = 1,
    die_at_sync: int | None = None,
    full_disk_of: int | None = None,
) -> list[Any]:
    """Start the ranks of a run as processes.

    Args:
        parameters: of the run.
        ranks: number of processes.
        die_at_sync: kills each of them when it forces its n-th file of states to disk.
        full_disk_of: rank that cannot write its rows of a state.
    """
    return start_ranks(
        _train_rank,
        ranks,
        [(parameters, die_at_sync, rank == full_disk_of) for rank in range(ranks)],
    )


def start_ranks(
    function: Callable[..., None], ranks: int, arguments_of_rank: list[tuple[Any, ...]]
) -> list[Any]:
    """Start processes that find each other by the environment. A test may bring the function."""
    _start_fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        process = _CONTEXT.Process(
            target=_rank_main,
            args=(function, rank, ranks, port, arguments_of_rank[rank]),
            daemon=True,
        )
        process.start()
        started.append(process)
    return started


def finish(processes: list[Any], seconds: float = 120) -> list[int | None]:
    """Wait for processes and give their exit codes; what hangs is killed and gives -9."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def complete(parameters: TrainingParameters, ranks: int = 1) -> None:
    """Run to the end in processes of their own."""
    assert finish(start(parameters, ranks)) == [0] * ranks


CODES: dict[type[Exception], int] = {
    ValueError: 2,
    Diverged: 3,
    Superseded: 4,
    OSError: 75,
    Preempted: 143,
}
"""Exit codes of the processes of `start`."""


def _rank_main(
    function: Callable[..., None], rank: int, ranks: int, port: int, told: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        function(*told)
    except tuple(CODES) as error:
        code = next(code for kind, code in CODES.items() if isinstance(error, kind))
        print(f"rank {rank}: {type(error).__name__}: {error}")
        raise SystemExit(code) from error


def _train_rank(parameters: TrainingParameters, die_at_sync: int | None, full_disk: bool) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if die_at_sync is not None:
        _die_at_sync(die_at_sync)
    if full_disk:
        pytest.MonkeyPatch().setattr(shards, "write_tensors", _no_space)
    run(parameters, stop)


def agree(first_rank_does: Callable[[], str], timeout_seconds: float, expected: str) -> None:
    """One rank of a world with a short timeout; ends well if all ranks got the expected text."""
    world = start_world("cpu", timeout=timedelta(seconds=timeout_seconds))
    assert from_first_rank(world, first_rank_does) == expected
    assert any_rank(world.rank == 1, world)
    assert not any_rank(False, world)
    stop_world(world)


def slow_words() -> str:
    """Longer than the timeout that the test gives."""
    time.sleep(4)
    return "grüße"


def bad_words() -> str:
    """What every rank shall raise."""
    raise ValueError("grüße")


def lost_folder() -> str:
    """What every rank shall raise."""
    raise Superseded("attempt 2")


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _die_at_sync(number: int) -> None:
    """SIGKILL this process when it forces its n-th file of states to disk, as a power cut would."""
    count = 0
    real: Callable[[Path], None] = shards.sync

    def sync(path: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    patch = pytest.MonkeyPatch()
    patch.setattr(shards, "sync", sync)
    patch.setattr(checkpoint, "sync", sync)

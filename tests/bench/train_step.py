"""A training step of osft beside plain fine-tuning, PEFT's OSF and LoRA, and mini_trainer on CUDA.

`make bench-train` (CPU) and `make bench-gpu` (CUDA); `--quick` shows in seconds that it works. One
model, one batch, one precision, one loss. On CPU all methods lie in memory side by side and take
turns step by step (A B C, A B C, ...), so that a busy machine slows all of them alike; the spread
is over these rounds. Then each takes two steps in a process of its own, for the peak of its
resident memory; MFU is the share of the rate at which one large matrix product runs between rounds.
On CUDA each turn is a process of its own, so that the peak memory is its own; of a single round the
spread is over its steps. The result goes to `tests/bench/results/`, and `make generate` puts it
into the README.

Where a command may not take long: `--minutes` ends it with what it has, `--turn-minutes` leaves out
a method that takes longer, `--methods` takes some, `--add` leaves the others in the result as they
are, `--base FOLDER` keeps the model for the next command, and `--random-bases` spares the splits,
which take hours on large models; a step takes as long with any bases.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine, mini_trainer_peer, tables, turns
from bench.methods import CUDA_ONLY, METHODS, Method, Setting
from bench.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES, counted, is_whole, save, step_flops
from osft_trainer.parallel import World
from osft_trainer.topology import usable_cpus

RESULTS = Path(__file__).with_name("results")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16, without sparsity, as the makers state them."""

Numbers = dict[str, Any]


def main() -> None:
    """Measure, write the result, print its table."""
    parser = _parser()
    arguments = _with_defaults(parser.parse_args())
    unknown = {*(arguments.methods or "").split(",")} - {*METHODS, ""}
    if unknown:
        parser.error(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: --device cuda needs a CUDA device, and torch sees none here")
    if arguments.only is not None:
        setting = _setting(arguments, arguments.work)
        turns.take(arguments.only, setting, _tokens(arguments), arguments)
        return
    names = [name for name in METHODS if _takes_part(name, arguments)]
    if arguments.add and _path(arguments).is_file():
        # Now, not when the first method has been measured.
        added(json.loads(_path(arguments).read_text("utf-8")), _result(arguments, {}, {}))
    with tempfile.TemporaryDirectory(prefix="osft-bench-") as folder:
        arguments.base = arguments.base or Path(folder) / "base"
        if not is_whole(arguments.base, arguments.shape):
            dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
            save(arguments.shape, arguments.base, dtype, arguments.device)
        if arguments.device == "cpu":
            _keep(arguments, _side_by_side(names, arguments, Path(folder)), {})
        else:
            turns.one_by_one(names, arguments, Path(folder), partial(_keep, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-100m, on CUDA qwen2.5-1.5b")
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes no result")
    parser.add_argument("--tokens", type=int, help="of a step; default: 512, on CUDA 8192")
    parser.add_argument("--rounds", type=int, help="turns of each method; default: 5, on CUDA 1")
    parser.add_argument("--steps", type=int, help="of a turn in a process; default: 1, on CUDA 15")
    parser.add_argument("--threads", type=int, help="default: all cores, as one rank is given; CPU")
    parser.add_argument("--ratio", type=float, default=0.25, help="unfreeze_rank_ratio")
    parser.add_argument("--methods", help="some of them, comma-separated; default: all")
    parser.add_argument("--machine", help="its name in the result; default: processor or GPU")
    parser.add_argument("--minutes", type=float, help="end after so long with what there is; CUDA")
    parser.add_argument("--turn-minutes", type=float, help="longest turn of a method; CUDA")
    parser.add_argument("--random-bases", action="store_true", help="split nothing; steps alone")
    parser.add_argument("--add", action="store_true", help="to the methods that the result has")
    parser.add_argument(
        "--base", type=machine.path, help="folder of the model, made where there is none"
    )
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=machine.path, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    on_cuda = arguments.device == "cuda"
    told = vars(arguments)
    told["suffix"] = "" if arguments.tokens is None else f"-{arguments.tokens}-tokens"
    told["suffix"] += "-random-bases" if arguments.random_bases else ""
    # Whatever else was told: a command that names a shape shall be quick, too.
    told["shape"] = "quick" if arguments.quick else arguments.shape or _default_shape(arguments)
    told["tokens"] = arguments.tokens or (8192 if on_cuda and not arguments.quick else 512)
    told["steps"] = arguments.steps or (15 if on_cuda else 1)
    told["rounds"] = arguments.rounds or (1 if on_cuda else 5)
    told["threads"] = arguments.threads or usable_cpus()
    return arguments


def _default_shape(arguments: argparse.Namespace) -> str:
    return CPU_SHAPES[-1] if arguments.device == "cpu" else CUDA_SHAPES[0]


def _takes_part(name: str, arguments: argparse.Namespace) -> bool:
    if arguments.methods is not None and name not in arguments.methods.split(","):
        return False
    if name not in CUDA_ONLY:
        return True
    if arguments.device == "cuda" and not mini_trainer_peer.is_installed():
        print(f"{name} does not take part: {mini_trainer_peer.INSTALL}")
    return arguments.device == "cuda" and mini_trainer_peer.is_installed()


def _setting(arguments: argparse.Namespace, work: Path) -> Setting:
    on_cuda = arguments.device == "cuda"
    return Setting(
        base=arguments.base,
        work=work,
        world=World(0, 0, 1, torch.device(arguments.device)),
        dtype=torch.bfloat16 if on_cuda else torch.float32,
        ratio=arguments.ratio,
        activation_checkpointing=on_cuda,
        liger=on_cuda,
        random_bases=arguments.random_bases,
    )


def _tokens(arguments: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(SHAPES[arguments.shape][2]["vocab_size"], (1, arguments.tokens))
    return ids.to(arguments.device)


def _side_by_side(
    names: list[str], arguments: argparse.Namespace, folder: Path
) -> dict[str, Numbers]:
    methods: dict[str, Method] = {}
    for number, name in enumerate(names):
        print(f"building {name}", file=sys.stderr)
        methods[name] = METHODS[name](_setting(arguments, folder / str(number)))
    tokens = _tokens(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for turn in range(arguments.rounds + 1):
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr)
        rates.append(machine.product_flops())
        for name, method in methods.items():
            step = turns.step(method, tokens)
            if turn > 0:  # the first one warms up
                seconds[name].append(step)
    arguments.peak_flops = statistics.median(rates)
    found = {
        name: {
            **turns.of_steps(method, seconds[name]),
            **turns.of_files(method, folder / f"{number}-written"),
        }
        for number, (name, method) in enumerate(methods.items())
    }
    methods.clear()  # the memory that others are measured in
    for number, name in enumerate(names):
        print(f"memory of {name}", file=sys.stderr)
        alone, failure = turns.turn_of(name, arguments, folder / str(number), turn=1)
        if alone is None:
            print(f"bench: {name} alone {failure}", file=sys.stderr)
        found[name]["peak_bytes"] = None if alone is None else alone["peak_bytes"]
    return found


def _keep(arguments: argparse.Namespace, found: dict[str, Numbers], failed: dict[str, str]) -> None:
    """Write and show what there is."""
    if not found:
        return
    result = _result(arguments, found, failed)
    if not arguments.quick:
        path = _path(arguments)
        path.parent.mkdir(exist_ok=True)
        if arguments.add and path.is_file():
            result = added(json.loads(path.read_text(encoding="utf-8")), result)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    print(tables.training_table(result), flush=True)


def _path(arguments: argparse.Namespace) -> Path:
    return RESULTS / f"train-{arguments.shape}-{arguments.device}{arguments.suffix}.json"


def added(before: Numbers, result: Numbers) -> Numbers:
    """The result with the methods of an earlier one, in the order of `METHODS`.

    Raises:
        ValueError: they are not of one setting.
    """
    apart = ("date", "methods", "failed", "threads", "peak_flops")
    different = [k for k in result if k not in apart and before.get(k) != result[k]]
    if different:
        raise ValueError(f"--add: the result that is there has another {', '.join(different)}")
    methods = {**before["methods"], **result["methods"]}
    failed = {**before.get("failed", {}), **result["failed"]}
    # What an earlier command had to leave out may be there now.
    failed = {n: why for n, why in failed.items() if n in result["failed"] or n not in methods}
    in_order = sorted(methods, key=[*METHODS].index)
    return {**result, "methods": {name: methods[name] for name in in_order}, "failed": failed}


def _result(
    arguments: argparse.Namespace, found: dict[str, Numbers], failed: dict[str, str]
) -> Numbers:
    on_cuda = arguments.device == "cuda"
    about = machine.circumstances(arguments.device)
    weights, multiplied = counted(arguments.shape)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in about["machine"]), None)
    return {
        **about,
        **({"machine": arguments.machine} if arguments.machine else {}),
        "device": arguments.device,
        "shape": arguments.shape,
        "weights": weights,
        "tokens": arguments.tokens,
        "ratio": arguments.ratio,
        "dtype": "bfloat16" if on_cuda else "float32",
        "activation_checkpointing": on_cuda,
        "random_bases": arguments.random_bases,
        "spread_over": "steps" if on_cuda and arguments.rounds == 1 else "rounds",
        "step_flops": step_flops(arguments.shape, multiplied, arguments.tokens),
        "peak_flops": peak if on_cuda else getattr(arguments, "peak_flops", None),
        "methods": found,
        "failed": failed,
    }


if __name__ == "__main__":
    main()

"""Looking before and after a run: `python -m osft_trainer.inspect plan | spectrum | export`.

Entry point only: reads arguments, calls `planning`, `spectrum` or `export_checkpoint`, prints. The
`osft` command starts it as a process, since it must not import torch itself. Exit codes: 0, or 2
for bad input and for a run that cannot fit. Must never start a process group.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from osft_trainer.arguments import from_argv
from osft_trainer.report import ExitCode

RATIOS = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75)
TOLERANCE = 0.05
MAX_TOKENS = 32768


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.action(arguments)
    except (ValueError, OSError) as error:
        print(f"osft: {error}", file=sys.stderr)
        code = ExitCode.BAD_INPUT
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="osft", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", allow_abbrev=False, help="what a run would do")
    plan.set_defaults(action=_plan)
    plan.add_argument("--processes", type=_positive_int, default=1)
    plan.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    plan.add_argument("--energy", action="store_true")
    plan.add_argument("--json", action="store_true")
    plan.add_argument("--memory-gib", type=_positive)
    plan.add_argument("--host-memory-gib", type=_positive, help="limit of the pod, per process")
    plan.add_argument("trainer", nargs="*", help="arguments of osft-train, after --")
    _add_spectrum(commands.add_parser("spectrum", allow_abbrev=False, description=_SPECTRUM))
    _add_export(commands.add_parser("export", allow_abbrev=False, description=_EXPORT))
    return parser


_SPECTRUM = """How much of a model lies in the directions that unfreezeRankRatio would free: the
singular-value energy of each matrix, and with --data what zeroing them costs in loss."""


def _add_spectrum(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_spectrum)
    parser.add_argument("model", help="folder of the model, or its hub name")
    parser.add_argument(
        "--data",
        type=_path,
        help="what the model shall go on to know: chat data (JSONL) or plain text (.txt)",
    )
    parser.add_argument(
        "--ratios",
        type=_ratios,
        default=list(RATIOS),
        help=f"comma-separated ratios to try (default: {','.join(map(str, RATIOS))})",
    )
    parser.add_argument(
        "--tolerance",
        type=_positive,
        default=TOLERANCE,
        help="most that zeroing may cost, nats a token (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_positive_int,
        default=MAX_TOKENS,
        help="tokens of the data that are used (default: %(default)s)",
    )
    parser.add_argument(
        "--target-pattern", action="append", help="as targetPatterns of a run; may be repeated"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    parser.add_argument("--plot", type=_path, help="picture to write, .png or .svg")
    parser.add_argument("--json", action="store_true", help="print JSON")


_EXPORT = """Write a state of a run (<run>/checkpoints/step-N) as a plain Hugging Face folder."""


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_export)
    parser.add_argument("checkpoint", type=_path, help="<run>/checkpoints/step-N")
    parser.add_argument("out", type=_path, help="folder to write")
    parser.add_argument(
        "--model", help="where the base model lies now, if not where the run had it"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights (default: the run's saveDtype, else the base model's)",
    )


def _plan(arguments: argparse.Namespace) -> int:
    training = from_argv(arguments.trainer, program="osft plan").training
    # Here and below: torch takes seconds to load, and wrong arguments shall be refused before.
    from osft_trainer.planning import make_report

    _hide_bars()

    report = make_report(
        training,
        processes=arguments.processes,
        device=arguments.device,
        energy=arguments.energy,
    )
    print(report.to_json() if arguments.json else report.to_text())
    device, host = arguments.memory_gib, arguments.host_memory_gib
    refusals = [
        None if host is None else report.host_refusal(host),
        None if device is None else report.refusal(device),
    ]
    for refusal in refusals:
        if refusal is not None:
            raise ValueError(refusal)
    limit = host if device is None and arguments.device == "cpu" else device
    warning = None if limit is None else report.warning(limit)
    if warning is not None:
        print(f"osft: warning: {warning}", file=sys.stderr)
    return ExitCode.DONE


def _spectrum(arguments: argparse.Namespace) -> int:
    from osft_trainer import spectrum, spectrum_plot

    _hide_bars()
    if arguments.plot is not None:
        spectrum_plot.check(arguments.plot)
    found = spectrum.measure(
        arguments.model,
        arguments.data,
        arguments.ratios,
        tolerance=arguments.tolerance,
        max_tokens=arguments.max_tokens,
        target_patterns=arguments.target_pattern,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.plot is not None:
        spectrum_plot.plot(found, arguments.plot)
    print(found.to_json() if arguments.json else found.to_text())
    return ExitCode.DONE


def _export(arguments: argparse.Namespace) -> int:
    from osft_trainer.export_checkpoint import export_checkpoint

    _hide_bars()
    position = export_checkpoint(
        arguments.checkpoint, arguments.out, arguments.model, arguments.dtype
    )
    print(f"wrote the model after step {position.step} to {arguments.out}")
    return ExitCode.DONE


def _hide_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _ratios(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < ratio < 1 for ratio in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be ratios between 0 and 1, both excluded, for example 0.1,0.25"
        )
    return found


def _path(text: str) -> Path:
    """`~` is the home also where a shell leaves it as it is, as behind `--data=`."""
    return Path(text).expanduser()


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def _positive_int(text: str) -> int:
    value = _positive(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number")
    return int(value)


if __name__ == "__main__":
    main()

"""The `osft` command: OSFTJobs on this machine and of a cluster, and a look at models and states.

Entry point only: reads files, calls local, render, spec, inspection and remote_commands, prints.
Exit codes: 0 succeeded, 1 the job failed, 2 bad input, 130 interrupted (`run` has saved). Must
never import torch, nor talk to a cluster itself.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from osft_operator import bounds, inspection, names, policy, render
from osft_operator.local import LocalJob
from osft_operator.resolved import RenderSettings, resolve
from osft_operator.spec import OSFTJob, problems
from osft_operator.terminal import Screen, print_status
from osft_trainer.config import TrainingParameters
from osft_trainer.parameters import at_home

Object = dict[str, Any]

SUCCEEDED, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
DEFAULT_FOLDER = Path("osft-volumes")

PASSED_ON = {
    "spectrum": "show what of a model lies in the directions that a ratio would free",
    "export": "write a state of a run as a Hugging Face folder",
}
"""Commands whose arguments are the trainer's business, with what `osft --help` says of them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    told = list(sys.argv[1:] if argv is None else argv)
    try:
        if told and told[0] in PASSED_ON:
            code = inspection.run(told)
        else:
            arguments = _parser().parse_args(told)
            code = arguments.action(arguments)
    except (ValueError, OSError) as error:
        print(f"osft: {error}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        if arguments.action is _run:
            print("osft: killed; what was saved before is there", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="osft", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run an OSFTJob on this machine, without a cluster")
    run.set_defaults(action=_run)
    run.add_argument("file", help="OSFTJob as YAML, or - for standard input")
    _add_volumes(run)
    run.add_argument("--quiet", action="store_true", help="no progress bar, only the status")
    plan = commands.add_parser(
        "plan",
        help="print what the run of an OSFTJob would do",
        description="Print what the run of an OSFTJob would do. Its data are tokenised into the "
        "run's cache, where the run finds them.",
    )
    plan.set_defaults(action=_plan)
    plan.add_argument("file", help="OSFTJob as YAML, or - for standard input")
    _add_volumes(plan)
    plan.add_argument("--energy", action="store_true", help="singular values, too: takes time")
    plan.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    plan.add_argument(
        "--memory-gib",
        metavar="GIB",
        help="memory of one process (of its GPU); exit with 2 if the run cannot fit into it, as "
        "with resources.limits.memory",
    )
    show = commands.add_parser("render", help="print the PyTorchJob that an OSFTJob becomes")
    show.set_defaults(action=_render)
    show.add_argument("file", help="OSFTJob as YAML, or - for standard input")
    show.add_argument("--image", default="osft-trainer:latest", help="trainer image, if unset")
    check = commands.add_parser("validate", help="print every problem of an OSFTJob")
    check.set_defaults(action=_validate)
    check.add_argument("file", nargs="+", help="OSFTJobs as YAML, or - for standard input")
    for name, text in PASSED_ON.items():
        commands.add_parser(name, help=text)
    _add_remote(commands)
    return parser


def _add_volumes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--volumes",
        type=lambda text: Path(text).expanduser(),
        default=DEFAULT_FOLDER,
        help="folder that stands for the cluster's storage: one folder in it per claim, and "
        "secrets/NAME and configmaps/NAME with a file per key (default: %(default)s)",
    )


def _add_remote(commands: Any) -> None:
    """Commands that look at a cluster, with the rights of the user's kubeconfig."""
    seen = commands.add_parser("watch", help="show an OSFTJob of a cluster until it ends")
    seen.set_defaults(action=_watch)
    log = commands.add_parser("logs", help="print the log of an OSFTJob's rank 0")
    log.set_defaults(action=_logs)
    log.add_argument(
        "-f", "--follow", action="store_true", help="go on across restarts, until the job ends"
    )
    log.add_argument("--tail", type=int, metavar="LINES", help="only the last lines")
    log.add_argument("-p", "--previous", action="store_true", help="of the run before a restart")
    for command in (seen, log):
        command.add_argument("name", metavar="NAME", help="of the OSFTJob")
        command.add_argument("-n", "--namespace", help="default: the kubeconfig's")
        command.add_argument("--context", help="of the kubeconfig")


def _watch(arguments: argparse.Namespace) -> int:
    # here, because the client takes a second to load, which no other command needs
    from osft_operator import remote_commands

    return remote_commands.watch(arguments)


def _logs(arguments: argparse.Namespace) -> int:
    from osft_operator import remote_commands

    return remote_commands.logs(arguments)


def load(file: str) -> list[Object]:
    """The OSFTJobs of a file; other kinds in it are passed over.

    Raises:
        ValueError: no YAML, or no OSFTJob in it.
    """
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    try:
        documents = [item for item in yaml.safe_load_all(text) if item is not None]
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    except RecursionError:
        raise ValueError(
            f"{file} is more than {bounds.MAX_LEVELS} levels deep: write it flatter"
        ) from None
    jobs = [item for item in documents if isinstance(item, dict) and item.get("kind") == names.KIND]
    if not jobs:
        raise ValueError(f"{file} holds no document of kind {names.KIND}: set apiVersion and kind")
    return jobs


def _one(file: str) -> Object | None:
    """The one valid OSFTJob of a file; None after its problems have been printed."""
    bodies = load(file)
    if len(bodies) > 1:
        raise ValueError(f"{file} holds {len(bodies)} OSFTJobs: give one")
    return bodies[0] if _report(file, bodies[0]) else None


def _for_this_machine(file: str) -> Object | None:
    """The same, with `~` in its paths taken for the caller's home: a pod has another."""
    body = _one(file)
    if body is None:
        return None
    training = at_home(body["spec"]["training"], TrainingParameters)
    return {**body, "spec": {**body["spec"], "training": training}}


def _report(file: str, body: Object) -> bool:
    found = problems(body)
    if not found:
        job = OSFTJob.model_validate(body)
        found = [str(denial) for denial in policy.denials(job)]
    for line in found:
        print(f"{file}: {line}", file=sys.stderr)
    return not found


def _validate(arguments: argparse.Namespace) -> int:
    valid = True
    for file in arguments.file:
        for body in load(file):
            if _report(file, body):
                print(f"{file}: OSFTJob {body['metadata']['name']} is valid")
            else:
                valid = False
    return SUCCEEDED if valid else BAD_INPUT


def _render(arguments: argparse.Namespace) -> int:
    body = _one(arguments.file)
    if body is None:
        return BAD_INPUT
    job = OSFTJob.model_validate(body)
    resolved = resolve(job, RenderSettings(trainer_image=arguments.image))
    claim = render.checkpoint_claim(job, resolved)
    manifests = [item for item in (claim, render.pytorch_job(job, resolved)) if item is not None]
    for manifest in manifests:
        # there is no OSFTJob on a server yet that could own them
        manifest["metadata"].pop("ownerReferences", None)
    print(yaml.safe_dump_all(manifests, sort_keys=False), end="")
    return SUCCEEDED


def _plan(arguments: argparse.Namespace) -> int:
    body = _for_this_machine(arguments.file)
    if body is None:
        return BAD_INPUT
    options = [f"--{name}" for name in ("energy", "json") if getattr(arguments, name)]
    if arguments.memory_gib is not None:
        options.append(f"--memory-gib={arguments.memory_gib}")
    return inspection.plan(body, arguments.volumes.resolve(), options)


def _run(arguments: argparse.Namespace) -> int:
    body = _for_this_machine(arguments.file)
    if body is None:
        return BAD_INPUT
    volumes = arguments.volumes.resolve()
    work_dir = volumes / ".run" / str(body["metadata"]["name"])
    # a batch system's end is a Ctrl-C, too: the state is saved
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            _alone(work_dir),
            LocalJob(body, volumes, work_dir) as job,
            Screen(job, quiet=arguments.quiet) as screen,
        ):
            status = _run_or_stop(job, screen)
            screen.close()
            print_status(job)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the newest checkpoint")
        return INTERRUPTED
    return SUCCEEDED if status["phase"] == "Succeeded" else FAILED


def _run_or_stop(job: LocalJob, screen: Screen) -> Object:
    """Run to the end; an interrupt stops the job, and a second one leaves it to be killed."""
    try:
        return job.run(screen.update)
    except KeyboardInterrupt:
        screen.say("stopping; the state is saved first, press Ctrl-C again to kill")
        job.stop()
        raise


@contextlib.contextmanager
def _alone(work_dir: Path) -> Iterator[None]:
    """Clear the job's folder, and keep a second run out: it would clear the first one's.

    Raises:
        ValueError: another process runs the job.
    """
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    with work_dir.with_name(f"{work_dir.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another `osft run` runs {work_dir.name} in {work_dir.parent.parent}: wait for "
                "its end, or use another name or --volumes"
            ) from None
        shutil.rmtree(work_dir, ignore_errors=True)
        yield

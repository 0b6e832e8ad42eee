"""The operator under load on a real API server, beside a plain kopf operator that renders the same.

`make bench-operator JOBS=1000` prints one JSON document, and writes it with --output. Each operator
gets a control plane of its own, the rights of an account of its own, and the same story: OSFTJobs
at a steady rate among others that have ended, their lives to the end, idleness, a restart among all
of them, and a crowd of one tenant beside a single job of another. No node runs: this program plays
training-operator and kubelet. What an operator wrote is counted from the API server's audit log.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import load_machine, load_operators, load_story
from cluster import binaries
from cluster.control_plane import ControlPlane
from cluster.fixtures import own_crds, pytorchjob_crd
from osft_operator import process_tree

logger = logging.getLogger("bench")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole story of one operator, on an API server of its own."""
    mark = f"osft-bench-{uuid.uuid4().hex}"
    with (
        tempfile.TemporaryDirectory(prefix="osft-bench-") as folder,
        process_tree.Watchdog(mark),
    ):
        plane = ControlPlane(binaries.ensure(), Path(folder) / "plane", mark)
        try:
            plane.start([pytorchjob_crd(), *own_crds()])
            with load_operators.OPERATORS[name](plane, Path(folder), mark) as operator:
                before = max(0, arguments.jobs - arguments.live)
                story = load_story.Story(plane, operator, arguments.jobs, before)
                # the peer asks no pod for its progress
                running = arguments.running if name == "osft" else 0
                result = story.play(
                    rate=arguments.rate, idle_seconds=arguments.idle, running=running
                )
                story.close()
                return result
        finally:
            plane.stop()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1000, help="OSFTJobs (default: %(default)s)")
    parser.add_argument(
        "--live",
        type=int,
        default=1000,
        help="of these, as many are created at the rate while the operator works; the others have "
        "ended before it starts (default: %(default)s)",
    )
    parser.add_argument("--rate", type=float, default=20, help="creates a second")
    parser.add_argument("--idle", type=float, default=20, help="seconds of idleness to measure")
    parser.add_argument(
        "--running", type=int, default=0, help="jobs that run and are polled in a further part"
    )
    parser.add_argument(
        "--only", choices=sorted(load_operators.OPERATORS), help="one operator alone"
    )
    parser.add_argument(
        "--output", type=lambda text: Path(text).expanduser(), help="file for the result"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    names = [arguments.only] if arguments.only else list(load_operators.OPERATORS)
    result: dict[str, Any] = {
        "command": " ".join(["python", "tests/bench/operator_load.py", *sys.argv[1:]]),
        "machine": load_machine.describe(),
        "jobs": arguments.jobs,
        "ended_before_the_operator_started": max(0, arguments.jobs - arguments.live),
        "creates_per_second": arguments.rate,
        "operators": {},
    }
    for name in names:
        result["operators"][name] = measure(name, arguments)
        if arguments.output:
            # after each, since the next may take long
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""`osft-operator`, also `python -m osft_operator`: settings, log, signals, run, exit code.

Exit codes: 0 stopped by SIGTERM or SIGINT; 1 the Lease was lost, or a watch died (start
it anew); 2 the settings or the way to the cluster are wrong (starting anew does not help).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from osft_operator import logs
from osft_operator.cluster import Cluster, ClusterError, looks_for
from osft_operator.informer import WatchEnded
from osft_operator.leader import LeaseLost
from osft_operator.service import Service
from osft_operator.settings import Settings

logger = logging.getLogger("osft_operator")

OTHER_CALLERS = 8
"""Who else waits for the API server beside the workers: lease, lists, events, looks at watches."""


def main() -> int:
    """Run the operator."""
    try:
        settings = Settings.from_environ(os.environ)
        logs.configure(settings.log_format, settings.log_level)
        cluster = Cluster.connect(
            timeout_seconds=settings.api_timeout_seconds,
            threads=settings.workers + OTHER_CALLERS,
            looks=looks_for(len(settings.namespaces), settings.watch_check_seconds),
        )
    except ValueError as error:
        print(f"osft-operator: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_run(settings, cluster))
    except (LeaseLost, WatchEnded, ClusterError) as error:
        logger.error("Ending: %s", error)
        return 1
    finally:
        cluster.close()
    logger.info("Stopped")
    return 0


async def _run(settings: Settings, cluster: Cluster) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Service(settings, cluster).run(stop)


if __name__ == "__main__":
    sys.exit(main())

"""Ending with the parent: no trainer process goes on unseen when the one that started it is killed.

Called by the launcher when `api` started it, and by each rank. Must never do anything but ask the
kernel.
"""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""prctl's option, from linux/prctl.h."""


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent is gone, so that this process saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

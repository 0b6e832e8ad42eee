"""OSFT training: contract, parameter splitting, training loop, Python API (loaded lazily).

Importing this package loads no torch; the names below load what they need when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osft_trainer.api import Backend, MiniTrainerOSFTBackend, OSFTAlgorithm, OSFTResult, osft

__all__ = ["Backend", "MiniTrainerOSFTBackend", "OSFTAlgorithm", "OSFTResult", "osft"]


if not TYPE_CHECKING:
    # Type checkers see the imports above; to them this would make every name an Any.

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(importlib.import_module("osft_trainer.api"), name)
        raise AttributeError(f"module 'osft_trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

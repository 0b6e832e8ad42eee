"""Numbers out of Kubernetes quantities: CPUs and GPUs of a pod.

Called by resolved. Pure; a quantity that the API server accepted is never refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_QUANTITY = re.compile(r"\+?([0-9]*\.?[0-9]+|[0-9]+\.)([numkMGTPE]|[KMGTPE]i|[eE][-+]?[0-9]+)?\Z")
_FACTORS = {
    "": 1.0,
    **{letter: 10.0 ** (3 * power) for power, letter in enumerate("num", -3)},
    **{letter: 10.0 ** (3 * power) for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGTPE", 1)},
}
_GPU = re.compile(r"(nvidia\.com/(gpu|mig-.+)|amd\.com/gpu|gpu\.intel\.com/.+|habana\.ai/gaudi)\Z")


def quantity(text: str) -> float:
    """A quantity as a number: `500m` is 0.5, `2Gi` is 2147483648.

    Raises:
        ValueError: the text is no quantity.
    """
    match = _QUANTITY.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no quantity; write for instance 500m, 4 or 100Gi")
    suffix = match[2] or ""
    if suffix not in _FACTORS:
        return float(f"{match[1]}{suffix}")
    return float(match[1]) * _FACTORS[suffix]


def gpus(limits: Mapping[str, str]) -> int:
    """Accelerators of a pod, over all kinds named in its limits."""
    return sum(math.floor(quantity(count)) for name, count in limits.items() if _GPU.match(name))


def threads(limits: Mapping[str, str], requests: Mapping[str, str], processes: int) -> int | None:
    """CPU threads for each process; None when one process may use what the node gives.

    torchrun sets one thread when several processes run and nothing is said.
    """
    cpus = limits.get("cpu") or requests.get("cpu")
    if cpus is None:
        return None if processes == 1 else 1
    return max(1, math.floor(quantity(cpus) / processes))

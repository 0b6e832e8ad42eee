"""Kubernetes quantities, exactly: their grammar, their bounds, and the CPUs and GPUs of a pod.

Called by the spec's models, crd_rules, the policy, resolved and the metrics. Pure. No float comes
near a quantity: `1e999` is an error in words, not an overflow. The bounds stand here as patterns
too, since the API server judges by patterns, and both must say the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

QUANTITY_PATTERN = (
    r"^([+]?([0-9]+(\.[0-9]*)?|\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE][-+]?[0-9]+))?$"
)
"""The API server's grammar of a quantity that is not negative."""


def _digits(most: int, first: str = "[0-9]") -> str:
    """Numbers of at most so many digits before the point."""
    return f"({first}{{1,{most}}}([.][0-9]*)?|[.][0-9]+)"


COUNTED_PATTERN = (
    "^[+]?0*("
    f"{_digits(18)}([num]|[eE]-0*[0-9]{{1,2}})?|"
    f"{_digits(15)}(k|Ki)|"
    f"{_digits(12)}Mi?|"
    f"{_digits(9)}(Gi?|[eE][+]?0*[0-9])|"
    f"{_digits(6)}Ti?|"
    f"{_digits(3)}Pi?|"
    f"{_digits(1, '[0-7]')}Ei?|"
    f"{_digits(1)}[eE][+]?0*1[0-7]"
    ")$"
)
"""A quantity below 8E: beyond, Kubernetes cuts the number, or cannot read it."""
WHOLE_PATTERN = "^[+]?([0-9]+([.]0*)?([kMGTPE]|[KMGTPE]i|[eE][+]?[0-9]+)?|[0-9]*000m)$"
"""A quantity that is written as a whole number."""

FRACTION_PATTERN = "[.]0*[1-9]"
"""Found in a quantity that is no whole number; the shortest, for rules that may not cost much."""
COUNTED_WORDS = "is beyond what Kubernetes can count: write a number below 8E, for instance 100Gi"
WHOLE_WORDS = "an extended resource is counted in whole numbers: write for instance 1"

MAX_CHARACTERS = 64
"""Longest quantity that is read."""
MAX_PROCESSES = 1024
"""Most processes of a pod."""

_LARGEST = 2**63 - 1
_NANO = 10**9
_FACTORS = {
    "": Fraction(1),
    **{letter: Fraction(1000) ** power for power, letter in enumerate("num", -3)},
    **{letter: Fraction(1000) ** power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Fraction(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}
_LARGEST_EXPONENT = 99
"""Of a number of so many characters, every larger exponent makes too much, or less than a nano."""
_GPU = re.compile(r"(nvidia\.com/(gpu|mig-.+)|amd\.com/gpu|gpu\.intel\.com/.+|habana\.ai/gaudi)\Z")
_QUANTITY = re.compile(QUANTITY_PATTERN.removesuffix("$") + r"\Z")
_COUNTED = re.compile(COUNTED_PATTERN.removesuffix("$") + r"\Z")
_WHOLE = re.compile(WHOLE_PATTERN.removesuffix("$") + r"\Z")


def quantity(text: str) -> Fraction:
    """A quantity as the exact number that Kubernetes takes it for: `500m` is 1/2.

    What is finer than a billionth is rounded up to one, as the API server does.

    Raises:
        ValueError: the text is no quantity, or more than Kubernetes can count.
    """
    match = _QUANTITY.match(text) if len(text) <= MAX_CHARACTERS else None
    if match is None:
        raise ValueError(f"{text[:MAX_CHARACTERS]!r} is no quantity: write for instance 500m or 4")
    number, suffix = Fraction(match[1]), match[4] or ""
    exponent = 0 if suffix in _FACTORS else int(suffix[1:])
    if number and exponent > _LARGEST_EXPONENT:
        raise ValueError(f"{text!r} {COUNTED_WORDS}")
    factor = _FACTORS.get(suffix) or Fraction(10) ** max(exponent, -_LARGEST_EXPONENT)
    value = Fraction(math.ceil(number * factor * _NANO), _NANO)
    if value > _LARGEST:
        raise ValueError(f"{text!r} {COUNTED_WORDS}")
    return value


def is_counted(text: str) -> bool:
    """Whether a text of the right grammar is a quantity that Kubernetes can count."""
    return _COUNTED.match(text) is not None


def is_whole(text: str) -> bool:
    """Whether a quantity is written as a whole number."""
    return _WHOLE.match(text) is not None


def is_extended(resource: str) -> bool:
    """Whether a resource is a device and the like, which a container has whole or not at all."""
    return "/" in resource and "kubernetes.io/" not in resource


def gpus(limits: Mapping[str, str]) -> int:
    """Accelerators of a pod, over all kinds named in its limits.

    Raises:
        ValueError: a number of them is no quantity.
    """
    return sum(math.floor(quantity(count)) for name, count in limits.items() if _GPU.match(name))


def threads(limits: Mapping[str, str], requests: Mapping[str, str], processes: int) -> int | None:
    """CPU threads for each process; None when one process may use what the node gives.

    torchrun sets one thread when several processes run and nothing is said.
    """
    cpus = limits.get("cpu") or requests.get("cpu")
    if cpus is None:
        return None if processes == 1 else 1
    return max(1, math.floor(quantity(cpus) / processes))

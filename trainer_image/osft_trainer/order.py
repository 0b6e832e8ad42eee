"""The order in which samples come, the same on every machine.

Called by what deals out samples: `packing`, `replay`, `retention`, `schedule`, `planning`. Pure.
Must never: depend on the world size, or on a random stream that its library may change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def epoch_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Permutation of range(num_samples) for this epoch, the same on every machine and version.

    Ranks of PCG64's raw 64-bit output for SeedSequence([seed, epoch]): numpy promises both streams
    for good, which it does not for Generator.permutation and torch does not for randperm.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(keys, kind="stable").astype(np.int64)

"""Kept and free singular vectors of one matrix, by the cheapest way that is accurate for it.

What lives here: the eigen-decomposition of the smaller Gram matrix, the check that it is good
enough for this matrix, and the singular value decomposition where it is not. Called by
`subspace.split_weight`. Must never: choose ranks, or return different bases for equal input.

Letters: A is n x m with n <= m (the matrix, or its transpose), s its singular values in falling
order, r the free ones at their end, k = n - r. A A^T = U diag(s^2) U^T has the size of the short
side, half the vectors and a cheaper reduction than a singular value decomposition; the vectors of
the long side follow as A^T U / s. Squaring costs digits: with e = 2^-53 and a modest constant c
- the vectors of the short side are orthonormal to c e whatever A is; the angle between the kept
  space found and the true one is c e s_1^2 / (s_k^2 - s_(k+1)^2), where a decomposition of A has
  c e s_1 / (s_k - s_(k+1)). Both are far below float32 rounding, unless s_k is tiny beside s_1.
- two vectors of the long side miss orthogonality by c e s_1^2 / (s_i s_j), which a Cholesky factor
  of their products mends while it is small.
So the only bad case is a tiny s_k, or, for free vectors of the long side, a tiny s_n (a matrix
without full rank): `_KEPT_FLOOR` and `_FREE_FLOOR` name it, and A itself is decomposed then.

On a CPU this takes .2 to .65 of the time of `torch.linalg.svd` (`make bench-bases`). On CUDA it is
the same code; beside products a decomposition of A is slower still there, but nothing is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT_FLOOR = 1e-8
"""Least (s_k / s_1)^2 of the Gram way."""
_FREE_FLOOR = 1e-12
"""Least (s_n / s_1)^2 of the Gram way, where free vectors of the long side are wanted."""
_MEND_BELOW = 1e-6
"""(s_k / s_1)^2 below which kept vectors of the long side need their Cholesky factor."""
_PART_BELOW = 2e-7
"""s_k s_n / s_1^2 below which free vectors of the long side must be parted from the kept ones."""


def matrix_bases(weight: Tensor, rank: int, parts: frozenset[str]) -> dict[str, Tensor]:
    """The named `subspace.Split` parts of a rows x cols matrix, in its dtype.

    Orthonormal and mutually orthogonal to about 1e-9 in float64. The entry of largest magnitude of
    every vector of the short side (rows, where both are equal) is positive; its partner's sign
    follows from that. Strong directions come first.

    Args:
        weight: float64, finite; on CPU or CUDA.
        rank: number of free directions, at least 1 and less than min(rows, cols).
        parts: names of fields of `Split`. `free_values` and both sides of everything
            (`factored`) take a singular value decomposition in any case.
    """
    rows, cols = weight.shape
    flipped = rows > cols
    matrix = weight.mT if flipped else weight
    short, long = ("cols", "rows") if flipped else ("rows", "cols")
    found = None
    if "free_values" not in parts:
        free_long, kept_long = (f"{kind}_{long}" in parts for kind in ("free", "kept"))
        found = _by_gram(matrix, rank, free_long, kept_long)
    if found is None:
        found = _by_svd(matrix, rank)
    names = {
        f"{kind}_{side}": found[f"{kind}_{place}"]
        for kind in ("kept", "free")
        for side, place in ((short, "short"), (long, "long"))
        if f"{kind}_{place}" in found
    }
    turned = {name: part.mT if name.endswith("cols") else part for name, part in names.items()}
    if "free_values" in found:
        turned["free_values"] = found["free_values"]
    return {name: turned[name] for name in parts}


def singular_values(weight: Tensor) -> Tensor:
    """All singular values of a rows x cols matrix in float64, falling.

    From the Gram matrix: small ones are right to about 1e-8 of the largest.
    """
    matrix = weight.double()
    matrix = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    squares: Tensor = torch.linalg.eigvalsh(matrix @ matrix.mT)
    return squares.clamp_min(0).sqrt().flip(0)


def _by_gram(
    matrix: Tensor, rank: int, free_long: bool, kept_long: bool
) -> dict[str, Tensor] | None:
    """Vectors as columns; None where squaring would cost too many digits."""
    try:
        values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    weakest, weakest_kept, top = values[[0, rank, -1]].tolist()
    # Written so that a matrix of zeros takes the other way, too.
    if not weakest_kept > _KEPT_FLOOR * top or (free_long and not weakest > _FREE_FLOOR * top):
        return None
    vectors = vectors.flip(1) * _signs(vectors.flip(1))
    kept, free = vectors[:, :-rank], vectors[:, -rank:]
    found = {"kept_short": kept, "free_short": free}
    if not (free_long or kept_long):
        return found
    partners_of_free = _unit(matrix.mT @ free) if free_long else None
    parted = weakest * weakest_kept > (_PART_BELOW * top) ** 2
    if kept_long or not parted:
        partners = _unit(matrix.mT @ kept)
        if weakest_kept < _MEND_BELOW * top:
            partners = _orthonormal(partners)
        found["kept_long"] = partners
        if partners_of_free is not None:
            # The kept ones are the accurate ones: what of them has leaked in is taken out.
            partners_of_free -= partners @ (partners.mT @ partners_of_free)
    if partners_of_free is not None:
        found["free_long"] = _orthonormal(partners_of_free)
    return found


def _by_svd(matrix: Tensor, rank: int) -> dict[str, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False, driver=_driver(matrix))
    signs = _signs(left)
    left, right = left * signs, right.mT * signs
    return {
        "kept_short": left[:, :-rank],
        "free_short": left[:, -rank:],
        "kept_long": right[:, :-rank],
        "free_long": right[:, -rank:],
        "free_values": values[-rank:],
    }


def _driver(matrix: Tensor) -> str | None:
    """How cuSOLVER shall decompose; None everywhere else, which has one way.

    Torch's default there is Jacobi's, up to a tolerance, and its documents say to take this one
    where values lie far apart or precision matters. Most of what comes here comes for that.
    """
    return "gesvd" if matrix.is_cuda and torch.version.hip is None else None


def _signs(vectors: Tensor) -> Tensor:
    """For each column the sign that makes its entry of largest magnitude positive; 1 x columns."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    signs = torch.gather(vectors, 0, largest).sign()
    return torch.where(signs == 0, torch.ones_like(signs), signs)


def _unit(vectors: Tensor) -> Tensor:
    """Columns of length 1."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=0, keepdim=True)
    return vectors / lengths


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the same space, next to the nearly orthonormal columns given."""
    factor = torch.linalg.cholesky(vectors.mT @ vectors)
    rows: Tensor = torch.linalg.solve_triangular(factor, vectors.mT, upper=False)
    return rows.mT

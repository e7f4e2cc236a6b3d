"""The trace of the matrix root in the Frechet distance, by the cheapest route that is exact for the matrices at hand."""

from __future__ import annotations

import torch
from torch import Tensor


def trace_of_root(
    covariance_1: Tensor, covariance_2: Tensor, root_1: Tensor | None = None, root_2: Tensor | None = None
) -> Tensor:
    """Trace of (S_1^(1/2) S_2 S_1^(1/2))^(1/2): real by construction.

    With S_i = B_i B_i^T it is the sum of the singular values of B_1^T B_2. Where both covariances have full rank, these are
    the roots of the eigenvalues of the symmetric L^T S_2 L, L from Cholesky: more than twice as fast as the eigenvalues
    of S_1 S_2, and within 1e-14 of the singular values also where the spectrum spans 11 decades. Where a rank is missing,
    the root would turn rounding errors of 1e-16 into 1e-8 each; there the singular values are taken.

    Args:
        covariance_1: (d, d), symmetric, positive semi-definite, float64.
        covariance_2: (d, d).
        root_1: B_1 (d, n) if it is at hand: the centred features divided by sqrt(n - 1), for n <= d.
        root_2: likewise.

    Returns:
        A float64 scalar.
    """
    if root_1 is None:
        root_1, full_1 = _triangle(covariance_1)
    else:
        full_1 = False
    if root_2 is None:
        root_2, full_2 = _triangle(covariance_2)
    else:
        full_2 = False
    if full_1 and full_2:
        values = torch.linalg.eigvalsh(lower_half(root_1, covariance_2)).clamp_min(0).sqrt()
    else:
        values = torch.linalg.svdvals(root_1.T @ root_2)
    total: Tensor = values.sum()
    return total


def lower_half(triangle: Tensor, covariance: Tensor, parts: int = 8) -> Tensor:
    """The lower half of L^T S L, which is all that eigvalsh reads.

    In bands, so that the zeros of L and the upper halves, which nobody reads, are not multiplied: a third of the work.

    Args:
        triangle: L (d, d), lower triangular.
        covariance: S (d, d), symmetric.
        parts: how many bands.
    """
    size = len(triangle)
    height = -(-size // parts)
    bands = [(start, min(start + height, size)) for start in range(0, size, height)]
    product, result = torch.zeros_like(covariance), torch.zeros_like(covariance)
    for start, end in bands:
        product[start:, start:end] = covariance[start:, start:] @ triangle[start:, start:end]
    for start, end in bands:
        result[start:end, :end] = triangle[start:, start:end].T @ product[start:, :end]
    return result


def _triangle(covariance: Tensor) -> tuple[Tensor, bool]:
    """A root of the covariance, and whether it is Cholesky's of a matrix of full rank."""
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    pivots = triangle.diagonal().square()
    # A missing rank leaves pivots of rounding noise, or negative ones, at which Cholesky fails.
    noise = len(pivots) * torch.finfo(pivots.dtype).eps * covariance.diagonal().amax()
    if not bool(failed) and bool(pivots.amin() > noise):
        return triangle, True
    return eigen_root(covariance), False


def eigen_root(covariance: Tensor) -> Tensor:
    """B (d, rank) with B B^T = covariance; eigenvalues that are rounding noise are dropped, as in matrix_rank."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    kept = values > noise
    columns: Tensor = vectors[:, kept] * values[kept].sqrt()
    return columns

"""Matrix products on a CPU by the BLAS of numpy and scipy, which computes symmetric ones at half the work.

torch has no such products; on other devices its general ones stand in. An array in row order is, transposed, one in
the column order of BLAS and LAPACK: so nothing is copied, and the upper triangle is called the lower one. They compute
with torch's number of threads, since that number changes the last bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

PANEL = 512  # rows of a symmetric result that are formed at once where there is no symmetric product


def add_products(sums: Tensor, rows: Tensor) -> None:
    """Add Σ a aᵀ over the rows a of a contiguous matrix (N, D) to the upper triangle of sums (D, D), in place.

    float64. What stands below the diagonal may change.
    """
    if sums.device.type == "cpu":
        _write(_library("blas").dsyrk, sums, rows, trans=False, beta=1)
    else:
        _add_panels(sums, rows)


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """x·y of all pairs of rows of x (N, D) and y (M, D): (N, M), in their precision."""
    if not _in_blas(x):
        return x @ y.T
    with _threads():
        return torch.from_numpy(x.numpy() @ y.numpy().T)


def own_products(x: Tensor, rest: float) -> Tensor:
    """x·y of each pair of different rows of x (N, D) once: above the diagonal of (N, N); `rest` in other places."""
    if not _in_blas(x):
        below = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril_()
        return (x @ x.T).masked_fill_(below, rest)
    blas, products = _library("blas"), x.new_full((len(x), len(x)), rest)
    _write(blas.ssyrk if x.dtype == torch.float32 else blas.dsyrk, products, x.contiguous(), trans=True, beta=0)
    return products.fill_diagonal_(rest)


def congruence(root: Tensor, matrix: Tensor) -> Tensor:
    """Rᵀ M R of R and a symmetric M (D, D), float64; in the upper triangle of the result. Faster where R is lower."""
    if matrix.device.type != "cpu" or root.triu(1).any():
        return root.T @ matrix @ root
    # LAPACK's name for it is that of its use, the reduction of a generalised eigenvalue problem.
    with _threads():
        found, failed = _library("lapack").dsygst(matrix.T.numpy(), root.numpy(), itype=2, lower=True)
    assert not failed
    return torch.from_numpy(found).T


def _add_panels(sums: Tensor, rows: Tensor) -> None:
    for top in range(0, len(sums), PANEL):
        sums[top : top + PANEL, top:].addmm_(rows[:, top : top + PANEL].T, rows[:, top:])


def _write(symmetric: Any, sums: Tensor, x: Tensor, *, trans: bool, beta: int) -> None:
    c = sums.numpy().T
    with _threads():
        written = symmetric(1, x.numpy().T, beta=beta, c=c, trans=trans, lower=True, overwrite_c=True)
    assert written is c  # else it was a copy


def _in_blas(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _threads() -> Any:
    return _controller().limit(limits=torch.get_num_threads(), user_api="blas")


@cache
def _controller() -> Any:
    import scipy.linalg  # noqa: F401  (it controls what is loaded)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _library(name: str) -> Any:
    import scipy.linalg  # here: not every program that may evaluate does

    return getattr(scipy.linalg, name)

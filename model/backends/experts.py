"""Products of rows sorted by expert with stacked weights (E, out, in), behind one switch.

Shapes: E experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import GroupedFp8
from model.layers import Products


def expert_products(backend: str, counts: Tensor) -> Products:
    """The products of a backend (see execution.expert_backend) for counts (E,) rows of each expert."""
    return _PRODUCTS[backend](counts)


def _loop(counts: Tensor) -> Products:
    """Expert by expert: the tests' reference, for every size and dtype."""
    sizes = counts.tolist()
    return Products(
        forward=lambda rows, weight: torch.cat(
            [r @ w.T for r, w in zip(rows.split(sizes), weight, strict=True)]
        ),
        to_rows=lambda grad, weight: torch.cat(
            [g @ w for g, w in zip(grad.split(sizes), weight, strict=True)]
        ),
        to_weight=lambda grad, rows: torch.stack(
            [g.T @ r for g, r in zip(grad.split(sizes), rows.split(sizes), strict=True)]
        ),
    )


def _grouped_mm(counts: Tensor) -> Products:
    """torch's grouped matrix products."""
    ends = counts.cumsum(0).int()
    return Products(
        forward=lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=ends),
        to_rows=lambda grad, weight: F.grouped_mm(grad, weight, offs=ends),
        to_weight=lambda grad, rows: F.grouped_mm(grad.T, rows, offs=ends),
    )


def _megablocks(counts: Tensor) -> Products:
    """The grouped products of megablocks' grouped MLP (GPU, bf16)."""
    from megablocks.grouped_gemm_util import backend  # type: ignore[import-not-found]

    sizes = counts.cpu()
    return Products(
        forward=lambda rows, weight: backend.gmm(rows, weight, sizes, trans_b=True),
        to_rows=lambda grad, weight: backend.gmm(grad, weight, sizes),
        to_weight=lambda grad, rows: backend.gmm(grad, rows, sizes, trans_a=True),
    )


def _fp8(counts: Tensor) -> Products:
    """See model/fp8.py."""
    grouped = GroupedFp8(counts)
    return Products(grouped.forward, grouped.to_rows, grouped.to_weight)


_PRODUCTS: dict[str, Callable[[Tensor], Products]] = {
    "loop": _loop,
    "grouped_mm": _grouped_mm,
    "megablocks": _megablocks,
    "fp8": _fp8,
}

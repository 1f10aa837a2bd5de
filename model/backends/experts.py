"""Products of rows sorted by expert with stacked weights (E, out, in), behind one switch.

Shapes: E experts, n rows, D hidden, F expert width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

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


def _padded(counts: Tensor) -> Products:
    """Batched products over blocks of equally many rows, for devices without grouped products.

    Every expert's rows fill blocks of their own, and zeros fill up the last. The number of blocks then has a
    limit that the host knows without reading the counts, wherever the router sends the rows: see _blocks.
    """
    blocks: Callable[[int], _Blocks] = functools.partial(_blocks, counts)
    if (
        not torch.compiler.is_compiling()
    ):  # the compiler finds equal ones itself, and no cache may be in a graph
        blocks = functools.cache(blocks)

    def forward(rows: Tensor, weight: Tensor) -> Tensor:
        b = blocks(len(rows))
        return b.rows(torch.bmm(b.padded(rows), weight[b.expert].transpose(1, 2)))

    def to_rows(grad: Tensor, weight: Tensor) -> Tensor:
        b = blocks(len(grad))
        return b.rows(torch.bmm(b.padded(grad), weight[b.expert]))

    def to_weight(grad: Tensor, rows: Tensor) -> Tensor:
        b = blocks(len(rows))
        each = torch.bmm(b.padded(grad).transpose(1, 2), b.padded(rows))
        # The sum over an expert's blocks as a product, which is exact to fp32 and always in the same order.
        own = (b.expert == torch.arange(len(counts), device=counts.device)[:, None]).to(each.dtype)
        return (own @ each.flatten(1)).unflatten(1, each.shape[1:])

    return Products(forward, to_rows, to_weight)


class _Blocks(NamedTuple):
    """Where n rows sorted by expert lie in blocks of `size` rows."""

    expert: Tensor  # (blocks,) whose weight a block is multiplied by; any for a block without rows
    place: Tensor  # (n,) of each row, counted through all blocks
    size: int

    def padded(self, rows: Tensor) -> Tensor:
        """(n, width) -> (blocks, size, width)."""
        room = rows.new_zeros(len(self.expert) * self.size, rows.shape[1])
        return room.index_copy_(0, self.place, rows).unflatten(0, (-1, self.size))

    def rows(self, padded: Tensor) -> Tensor:
        """(blocks, size, width) -> (n, width)."""
        return padded.flatten(0, 1)[self.place]


def _blocks(counts: Tensor, n: int) -> _Blocks:
    """Blocks for counts (E,) rows of each expert, n in all, from sizes that the host knows.

    With the mean n / E as their size (a multiple of 16, for tensor cores) there are at most 2 E blocks: twice
    the products of even routing, and two copies of the weights.
    """
    size = 16 * max(1, -(-n // (16 * len(counts))))
    blocks = n // size + min(len(counts), n)  # each expert has at most one that is not full
    ends, last = counts.cumsum(0), ((counts + size - 1) // size).cumsum(0)
    of_row = torch.searchsorted(ends, torch.arange(n, device=counts.device), right=True)
    first_place = size * F.pad(last[:-1], (1, 0)) - (ends - counts)
    place = torch.arange(n, device=counts.device) + first_place[of_row]
    of_block = torch.searchsorted(last, torch.arange(blocks, device=counts.device), right=True)
    return _Blocks(of_block.clamp(max=len(counts) - 1), place, size)


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
    "padded": _padded,
    "megablocks": _megablocks,
    "fp8": _fp8,
}

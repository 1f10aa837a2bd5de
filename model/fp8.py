"""Matrix products in FP8 as DeepSeek-V3 trains them (arXiv 2412.19437, section 3.3): execution.precision=fp8.

Every operand is E4M3. Activations and gradients are scaled by tiles of 1 x 128 numbers along the dimension
they are summed over, weights by blocks of 128 x 128; a scale is the largest magnitude / 448, in fp32. The
three products of a linear layer, forward, to the rows' gradient and to the weight's, sum 128 products at a
time and add these sums, scaled, in fp32. For the weight's gradient both operands have tiles along the tokens.

Where this differs from the paper: no scale is a power of two. The paper rounds some to powers of two, those
of activations that it keeps in FP8 and scales again for the weight's gradient. Here backward reads what the
forward pass kept in the model's dtype: every operand is rounded once, and attention's output needs no E5M6.

Shapes: n rows, E experts. An operand of a product is (rows or columns of the result, length of the sum).
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # numbers along the sum that share a scale; also a weight's rows that do
ROWS = 16  # kernels take results whose rows and columns are multiples of this
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
# Of a scale: below it, largest / 448 would lose digits or be 0.
SMALLEST = torch.finfo(torch.float32).smallest_normal


class Scaled(NamedTuple):
    """An operand in FP8, padded with zeros to whole tiles or blocks, which changes no sum."""

    values: Tensor  # (R, L) e4m3, contiguous along L
    scales: Tensor  # fp32: (R, L/128) of tiles, or (R/128, L/128) of blocks

    @property
    def in_blocks(self) -> bool:
        return len(self.scales) != len(self.values)

    def rows(self, start: int, end: int) -> "Scaled":
        """A part of an operand in tiles."""
        return Scaled(self.values[start:end], self.scales[start:end])

    def columns(self, start: int, end: int) -> "Scaled":
        """A part, by whole tiles, of the sum."""
        return Scaled(self.values[:, start:end], self.scales[:, start // BLOCK : end // BLOCK])

    def transposed(self) -> "Scaled":
        """The transposed operand; only blocks stay blocks."""
        return Scaled(self.values.T.contiguous(), self.scales.T)


def tiles(x: Tensor) -> Scaled:
    """x (R, L) scaled by tiles of 1 x 128. A tile with a number that is not finite has a NaN."""
    x = _padded(x, ROWS, BLOCK)
    split = x.unflatten(1, (x.shape[1] // BLOCK, BLOCK))
    scales = _scales(split, (-1,))
    return Scaled((split / scales[..., None]).to(E4M3).flatten(1).contiguous(), scales)


def blocks(weight: Tensor) -> Scaled:
    """weight (R, L) scaled by blocks of 128 x 128."""
    weight = _padded(weight, BLOCK, BLOCK)
    split = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = _scales(split, (1, 3))
    values = (split / scales[:, None, :, None]).to(E4M3)
    return Scaled(values.reshape(weight.shape).contiguous(), scales)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (R, L) with zeros up to multiples; F.pad would copy even where there is nothing to add."""
    missing = -x.shape[0] % rows, -x.shape[1] % columns
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def _scales(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = torch.linalg.vector_norm(x, float("inf"), dims)  # as abs().amax(), in one pass
    return (largest.float() / LARGEST).clamp(min=SMALLEST)


def product(a: Scaled, b: Scaled, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """a @ b.T without its padding: `shape`, in `dtype`. `a` is in tiles, b in tiles or blocks."""
    if not a.values.numel() or not b.values.numel():
        return torch.zeros(shape, dtype=dtype, device=a.values.device)
    multiply = emulated if a.values.device.type == "cpu" else on_device
    return multiply(a, b, dtype)[: shape[0], : shape[1]]


def emulated(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """The product in plain torch, the same bits at any shape and on any number of threads.

    Products of E4M3 are multiples of 2^-18 below 2^18, so fp64 adds 128 of them exactly: each sum is rounded
    once to fp32, scaled, and added in fp32 in the order of the tiles. Hopper's cores keep fewer digits.
    """
    scales_b = b.scales.repeat_interleave(BLOCK, 0) if b.in_blocks else b.scales
    out = a.values.new_zeros(len(a.values), len(b.values), dtype=torch.float32)
    pairs = zip(a.values.split(BLOCK, 1), b.values.split(BLOCK, 1), strict=True)
    for number, (part_a, part_b) in enumerate(pairs):
        # As a batch of one: `selective` checkpointing would keep every two-dimensional product.
        exact = part_a.double()[None] @ part_b.double().T[None]
        out += exact[0].float() * (a.scales[:, number, None] * scales_b[None, :, number])
    return out.to(dtype)


def on_device(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """The product by cuBLAS. Rows of scales are adjacent; blocks have theirs as (sum, columns), padded to 4.

    torch 2.13 has it for compute capability 9 and CUDA 12.9 or later; see execution.require_fp8.
    """
    scales_b = F.pad(b.scales.T, (0, 0, 0, -b.scales.shape[1] % 4)) if b.in_blocks else b.scales
    return F.scaled_mm(
        a.values,
        b.values.T,
        _rows_adjacent(a.scales),
        F.ScalingType.BlockWise1x128,
        _rows_adjacent(scales_b),
        F.ScalingType.BlockWise128x128 if b.in_blocks else F.ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )


def _rows_adjacent(scales: Tensor) -> Tensor:
    """The same (R, C) with strides (1, R); contiguous() would leave a single column as it is."""
    return scales.T.clone(memory_format=torch.contiguous_format).T


def fp8_forward(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (n, in), weight (out, in) -> (n, out)."""
    return product(tiles(rows), blocks(weight), (len(rows), len(weight)), rows.dtype)


def fp8_to_rows(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient (n, out), weight (out, in) -> gradient of the rows (n, in)."""
    shape = (len(grad), weight.shape[1])
    return product(tiles(grad), blocks(weight).transposed(), shape, grad.dtype)


def fp8_to_weight(grad: Tensor, rows: Tensor) -> Tensor:
    """Gradient (n, out), rows (n, in) -> gradient of the weight (out, in), summed over the rows."""
    return product(tiles(grad.T), tiles(rows.T), (grad.shape[1], rows.shape[1]), grad.dtype)


class _Linear(torch.autograd.Function):
    """x @ weight.T that keeps its operands as they are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return fp8_forward(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (rows, weight) = grads, ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad
        return (
            fp8_to_rows(grad, weight) if needs_rows else None,
            fp8_to_weight(grad, rows).to(weight.dtype) if needs_weight else None,
        )


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out), all three products in FP8."""
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], len(weight))


class GroupedFp8:
    """The three products of rows sorted by expert with stacked weights (E, out, in), expert by expert.

    torch 2.13's scaled_grouped_mm takes no scales by tiles of 128, so each expert's product is one call and
    the host must know how many rows it has. An expert's rows are padded to whole tiles of their own, so that
    another expert's rows never change its scales.

    Args:
        counts: (E,) rows of each expert; any may be 0.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts, self.sizes = counts, counts.tolist()

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows (n, in), weight (E, out, in) -> (n, out)."""
        return self._by_expert(rows, [blocks(w) for w in weight], weight.shape[1])

    def to_rows(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Gradient (n, out), weight (E, out, in) -> gradient of the rows (n, in)."""
        return self._by_expert(grad, [blocks(w).transposed() for w in weight], weight.shape[2])

    def to_weight(self, grad: Tensor, rows: Tensor) -> Tensor:
        """Gradient (n, out), rows (n, in) -> gradient of the weights (E, out, in)."""
        places, bounds = self._places(BLOCK)
        a, b = (tiles(_spread(x, places, bounds[-1]).T) for x in (grad, rows))
        shape = (grad.shape[1], rows.shape[1])
        return torch.stack(
            [
                product(a.columns(start, end), b.columns(start, end), shape, grad.dtype)
                for start, end in pairwise(bounds)
            ]
        )

    def _by_expert(self, rows: Tensor, weights: list[Scaled], columns: int) -> Tensor:
        places, bounds = self._places(ROWS)
        a = tiles(_spread(rows, places, bounds[-1]))
        out = [
            product(a.rows(start, end), weight, (end - start, columns), rows.dtype)
            for (start, end), weight in zip(pairwise(bounds), weights, strict=True)
        ]
        return torch.cat(out)[places]

    def _places(self, multiple: int) -> tuple[Tensor, list[int]]:
        """Places (n,) of the rows if each expert starts at a multiple, and the experts' bounds."""
        missing = -self.counts % multiple
        shift = (missing.cumsum(0) - missing).repeat_interleave(self.counts, output_size=sum(self.sizes))
        bounds = accumulate((size + -size % multiple for size in self.sizes), initial=0)
        return shift + torch.arange(len(shift), device=shift.device), list(bounds)


def _spread(rows: Tensor, places: Tensor, length: int) -> Tensor:
    """rows (n, D) at their places in zeros (length, D)."""
    return rows.new_zeros(length, rows.shape[1]).index_copy_(0, places, rows)

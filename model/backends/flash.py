"""Causal attention within the documents of packed rows by flash kernels: GPU, 16 bits, no masked scores.

They read the B*T tokens of all rows as one row, and where its documents begin.

Shapes: B rows, T tokens per row, H query heads, G key-value heads, K key width, V value width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch, row after row.

    Empty ones are legal but cost memory: backward keeps 128 fp32 rows of every head for each document.
    """

    boundaries: Tensor  # (n + 1,) int32, ascending, from 0 to B*T
    longest: int  # tokens of the longest document; on the host, so that no kernel launch waits for it

    def repeated(self, times: int) -> "Documents":
        """The same documents with every token `times` times."""
        return self if times == 1 else Documents(self.boundaries * times, self.longest * times)


def row_documents(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Documents:
    """Documents of which the host knows nothing: some may be empty, and the longest may fill its row.

    Args:
        cu_seqlens: (B, n) starts of the documents of each row, padded with T; None: one per row.
    """
    rows = torch.arange(B, device=device, dtype=torch.int32)[:, None] * T
    starts = rows if cu_seqlens is None else rows + cu_seqlens.int()
    return Documents(F.pad(starts.flatten(), (0, 1), value=B * T), T)


def choose_kernels(backend: str) -> None:
    """Makes torch's flash attention run FlashAttention-4 for backend flash_attn_4, else its own kernels.

    torch has one choice per process, for forward and backward.
    """
    chosen = "FA4" if backend == "flash_attn_4" else None
    if current_flash_attention_impl() == chosen:
        return
    if chosen is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(chosen)


def varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """torch's kernel: query (B, T, H, K), key (B, T, G, K), value (B, T, G, V) -> (B, T, H, V)."""
    width = _aligned(max(query.shape[-1], value.shape[-1]))
    return _over_documents(_torch_varlen, query, key, value, documents, scale, (width, width))


def flash_attn(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """FlashAttention-2's own package; shapes as for varlen."""
    width = _aligned(max(query.shape[-1], value.shape[-1]))
    return _over_documents(_flash_attn_2, query, key, value, documents, scale, (width, width))


def flash_attn_4(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """FlashAttention-4 behind torch's operator; shapes as for varlen."""
    generation, _ = torch.cuda.get_device_capability(query.device)
    widths = flash_attn_4_widths(query.shape[-1], value.shape[-1], generation)
    # While compiling, torch assumes an output as wide as the queries.
    kernel = torch.compiler.disable(_torch_varlen) if widths[0] != widths[1] else _torch_varlen
    return _over_documents(kernel, query, key, value, documents, scale, widths)


def flash_attn_4_widths(K: int, V: int, generation: int) -> tuple[int, int]:
    """The narrowest widths of keys and values not below K and V that FlashAttention-4 takes.

    Hopper (generation 9) takes multiples of 8, Blackwell (10) those up to 128 and two wider shapes.
    """
    K, V = _aligned(max(K, V)), _aligned(V)
    if generation == 9 or K <= 128:
        return K, V
    return (192, 128) if K <= 192 and V <= 128 else (256, 256)


def _aligned(width: int) -> int:
    return 8 * math.ceil(width / 8)


def _over_documents(
    kernel: Callable[[Tensor, Tensor, Tensor, Documents, float], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    widths: tuple[int, int],
) -> Tensor:
    """Runs a kernel on the tokens of all rows, with queries, keys and values padded to `widths`, exactly:
    zeros add nothing to a score, and zero columns of the values are cut off.
    """
    T, V = query.shape[1], value.shape[-1]
    query, key = _one_row(query, widths[0]), _one_row(key, widths[0])
    out = kernel(query, key, _one_row(value, widths[1]), documents, scale)
    return out.unflatten(0, (-1, T))[..., :V]


def _one_row(x: Tensor, width: int) -> Tensor:
    """(B, T, heads, w) -> (B*T, heads, width); a view if `width` is the width."""
    missing = width - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing else x).flatten(0, 1)


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    bounds, longest = documents.boundaries, documents.longest
    out = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def _flash_attn_2(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    bounds, longest = documents.boundaries, documents.longest
    out: Tensor = flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )
    return out

"""Recurrent Memory Transformer (Bulatov et al., arXiv 2207.06881, eq. 1-3), decoder form: a baseline.

A document is read segment by segment. A segment is [memory | tokens | memory] under causal attention; the
output at the last positions is the memory that the next segment starts with. Nothing else passes between
segments.

Shapes: B rows, T tokens, N documents, M memory tokens, L segment length, D hidden.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config.model import ModelConfig


class MemoryState(NamedTuple):
    """What decoding keeps per row: the memory of its finished segments and the tokens of the open one."""

    memory: Tensor  # (B, M, D)
    tokens: Tensor  # (B, P) int64
    real: Tensor  # (B, P) booleans


# embedded (N, n, D) and which of them exist (N, n) -> final normed states (N, n, D)
RunSegment = Callable[[Tensor, Tensor], Tensor]


class RecurrentMemory(nn.Module):
    """Carries a memory from segment to segment; the initial one is learned."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.segment_length is not None
        self.length = config.segment_length
        self.initial = nn.Embedding(config.num_memory_tokens, config.hidden_size)

    def forward(
        self,
        tokens: Tensor,
        segment: Tensor,
        embed: Callable[[Tensor], Tensor],
        run: RunSegment,
        state: MemoryState | None,
        all_segments: bool,
    ) -> tuple[Tensor, MemoryState]:
        """Reads the documents of some rows.

        Args:
            tokens: (B, T) int64.
            segment: (B, T), the document of each token, negative for padding; see context.segments.
            state: from the rows' earlier tokens; each row is then one document.
            all_segments: read as many segments as a row of T tokens can have, so that all ranks read equally
                many, whatever their documents.

        Returns:
            (B, T, D) states, 0 for padding, and what decoding keeps, given one document per row.
        """
        B, T = tokens.shape
        real, rows = segment >= 0, torch.arange(B, device=tokens.device)[:, None]
        number = rows.expand(B, T)
        if state is None:
            number = rows * T + segment
        else:
            tokens, real = torch.cat((state.tokens, tokens), 1), torch.cat((state.real, real), 1)
            number = rows.expand_as(tokens)
        documents = B if state is not None else None
        document, offset, lengths = _documents(number, real, documents)
        longest = max(int(lengths.max()) if len(lengths) else 1, 1)
        if all_segments:
            longest = T
        unpacked = tokens.new_zeros(len(lengths), longest)
        unpacked[document, offset] = tokens[real]
        memory = self._start(tokens, len(lengths)) if state is None else state.memory
        hidden, memory = self._read(unpacked, lengths, memory, embed, run)
        out = hidden.new_zeros(*tokens.shape, hidden.shape[-1])
        out[real] = hidden[document, offset]
        return out[:, -T:], self._open_segment(memory, unpacked, lengths)

    def first_state(self, tokens: Tensor) -> MemoryState:
        """State (B rows) before any token."""
        nothing = tokens[:, :0]
        return MemoryState(self._start(tokens, len(tokens)), nothing, nothing.bool())

    def _start(self, like: Tensor, documents: int) -> Tensor:
        """The learned memory, (documents, M, D)."""
        learned = self.initial(torch.arange(self.initial.num_embeddings, device=like.device))
        return learned.expand(documents, -1, -1)

    def _read(
        self,
        tokens: Tensor,
        lengths: Tensor,
        memory: Tensor,
        embed: Callable[[Tensor], Tensor],
        run: RunSegment,
    ) -> tuple[Tensor, Tensor]:
        """tokens (N, n) of lengths (N,) -> states (N, n, D), and the memory after the last full segment."""
        M, states = memory.shape[1], []
        for first in range(0, tokens.shape[1], self.length):
            part = tokens[:, first : first + self.length]
            offset = torch.arange(first, first + part.shape[1], device=tokens.device)
            held = torch.ones(len(tokens), M, dtype=torch.bool, device=tokens.device)
            exists = torch.cat((held, offset < lengths[:, None], held), 1)
            hidden = run(torch.cat((memory, embed(part), memory), 1), exists)
            states.append(hidden[:, M:-M])
            full = lengths >= first + self.length
            memory = torch.where(full[:, None, None], hidden[:, -M:], memory)
        return torch.cat(states, 1), memory

    def _open_segment(self, memory: Tensor, tokens: Tensor, lengths: Tensor) -> MemoryState:
        """The tokens (N, n) after each document's last full segment."""
        done = lengths // self.length * self.length
        offset = torch.arange(self.length, device=tokens.device) + done[:, None]
        real = offset < lengths[:, None]
        kept = tokens.gather(1, offset.clamp(max=tokens.shape[1] - 1))
        width = int((lengths - done).max()) if len(lengths) else 0
        return MemoryState(memory, kept[:, :width], real[:, :width])


def _documents(number: Tensor, real: Tensor, documents: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each real token's document (n,) and its offset in it (n,), and all documents' lengths (N,).

    Args:
        number: (B, T), equal within a document, rising in reading order.
        documents: N, if the numbers already are 0..N-1.
    """
    numbers = number[real]
    if documents is None:
        _, index, lengths = numbers.unique_consecutive(return_inverse=True, return_counts=True)
    else:
        index, lengths = numbers, numbers.bincount(minlength=documents)
    starts = lengths.cumsum(0) - lengths
    return index, torch.arange(len(numbers), device=number.device) - starts[index], lengths

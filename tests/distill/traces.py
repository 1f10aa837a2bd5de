"""Random traced documents, packed as the loader packs them."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from model.losses import IGNORE_INDEX

PAD, BOS, EOS, BOT, EOT, STEP = 0, 2, 3, 4, 5, 6
PREFIX = [7, 8]  # starts every answer
TRACE = 25  # tokens from here on occur only in traces
VOCABULARY = 40
IDS = {"bot_id": BOT, "eot_id": EOT, "step_id": STEP, "prefix_length": len(PREFIX)}


@dataclass(frozen=True)
class Document:
    question: list[int]
    steps: list[list[int]]
    value: list[int]

    @property
    def trace(self) -> list[int]:
        return [token for i, step in enumerate(self.steps) for token in [STEP] * (i > 0) + step]

    @property
    def answer(self) -> list[int]:
        return [*PREFIX, *self.value, EOS]

    @property
    def tokens(self) -> list[int]:
        return [BOS, *self.question, BOT, *self.trace, EOT, *self.answer]


def documents(count: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)

    def text(low: int, high: int, ids: range) -> list[int]:
        return [rng.choice(ids) for _ in range(rng.randint(low, high))]

    traces, others = range(TRACE, VOCABULARY), range(9, TRACE)
    return [
        Document(
            text(2, 6, others), [text(2, 5, traces) for _ in range(rng.randint(1, 4))], text(1, 2, others)
        )
        for _ in range(count)
    ]


def packed(rows: list[list[Document]], length: int) -> dict[str, Tensor]:
    """The inputs of a training step: each row's documents one after another, then padding."""
    tokens = torch.full((len(rows), length), PAD)
    targets = torch.full((len(rows), length), IGNORE_INDEX)
    cu_seqlens = torch.full((len(rows), 2 + max(map(len, rows))), length, dtype=torch.int32)
    lengths = torch.zeros(len(rows), dtype=torch.int64)
    for r, row in enumerate(rows):
        position = 0
        for i, document in enumerate(row):
            cu_seqlens[r, i] = position
            ids = torch.tensor(document.tokens)
            first = len(document.question) + 1  # the position of <bot>, where the loss begins
            tokens[r, position : position + len(ids)] = ids
            targets[r, position + first : position + len(ids) - 1] = ids[first + 1 :]
            position += len(ids)
        cu_seqlens[r, len(row)] = lengths[r] = position
        if not row:
            cu_seqlens[r, 0] = 0
    return {
        "tokens": tokens,
        "targets": targets,
        "cu_seqlens": cu_seqlens,
        "attention_mask": torch.arange(length) < lengths[:, None],
    }

"""Texts as windows of tokens, and a model's perplexity on them.

Shapes: n windows, T tokens predicted in each.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.schema import Count, CountOrZero, as_type
from data_pipeline.tokenization.tokenizer import Tokenizer
from model.config.model import ModelConfig
from model.export_files import TOKENIZER_NAME
from model.transformer import ZeroModel

_MOST_NATS = 700  # of a mean loss whose perplexity is a finite number
WINDOW = 512  # tokens predicted in a window; fewer for a model whose sequences are shorter
_CHARACTERS_PER_TOKEN = 8  # first guess of how much of a file to encode


@dataclass(frozen=True)
class Texts:
    """Windows of one text, each of them <s> and the T tokens that follow each other there."""

    calibration: Tensor  # (n, T+1) int64
    evaluation: Tensor  # (n, T+1) int64, of the part that comes after


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean cross-entropy over `tokens` predictions."""

    perplexity: float
    error: float  # standard error, from the spread of the windows' means; NaN for one window
    tokens: int

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} +- {self.error:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """For conversion.json, which has no NaN."""
        return asdict(self) | {"error": self.error if math.isfinite(self.error) else None}


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """--text and --evaluation_tokens, for read_texts."""
    parser.add_argument("--text", type=Path, help="UTF-8 text; perplexity is measured on a part of it")
    parser.add_argument(
        "--evaluation_tokens", type=int, default=16384, help="to measure perplexity on (default %(default)s)"
    )


def read_texts(
    text: Path, checkpoint: Path, config: ModelConfig, evaluation_tokens: int, calibration_tokens: int = 0
) -> Texts:
    """Windows from the start of a file: first those for calibration, then those for evaluation.

    Args:
        checkpoint: the folder whose tokenizer encodes the text.
        evaluation_tokens, calibration_tokens: rounded down to whole windows, but at least one if above 0.

    Raises:
        ValueError: the folder has no tokenizer or one of another model, the file is not UTF-8 or too short.
        OSError: the file cannot be read.
    """
    length = min(WINDOW, config.max_position_embeddings)
    counts = []
    for kind, name, value in (
        (CountOrZero, "--calibration_tokens", calibration_tokens),
        (Count, "--evaluation_tokens", evaluation_tokens),
    ):
        tokens = as_type(kind, value, name)
        counts.append(max(tokens // length, min(tokens, 1)))
    needed = sum(counts) * length
    tokenizer = _tokenizer(checkpoint, config)
    ids = _first_ids(text, tokenizer, needed)
    if len(ids) < needed:
        raise ValueError(
            f"{text} has {len(ids):,} tokens, but {needed:,} are needed in windows of {length}; lower "
            "--evaluation_tokens or --calibration_tokens, or give a longer text"
        )
    rows = torch.tensor(ids[:needed]).view(-1, length)
    windows = torch.cat((torch.full((len(rows), 1), tokenizer.bos_id), rows), 1)
    return Texts(windows[: counts[0]], windows[counts[0] :])


def _tokenizer(checkpoint: Path, config: ModelConfig) -> Tokenizer:
    path = checkpoint / TOKENIZER_NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {TOKENIZER_NAME} to encode --text with; leave --text out")
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size:,} tokens, but the model only vocab_size="
            f"{config.vocab_size:,}; give the tokenizer of this model"
        )
    return tokenizer


def _first_ids(path: Path, tokenizer: Tokenizer, needed: int) -> list[int]:
    """At least `needed` ids from the start of a text, or all of them."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); give a plain text file") from None
    size = _CHARACTERS_PER_TOKEN * needed
    ids = tokenizer.encode(text[:size])
    while len(ids) < needed and size < len(text):
        size *= 2
        ids = tokenizer.encode(text[:size])
    return ids


@torch.no_grad()
def perplexity(model: ZeroModel, windows: Tensor, num_steps: int | None = None) -> Perplexity:
    """Of windows (n, T+1), each read alone.

    Args:
        num_steps: loop steps; default: the config's.

    Raises:
        ValueError: the loss is not finite, or too large to be one of a language model.
    """
    means = []
    for window in windows.split(1):
        out = model(window[:, :-1], targets=window[:, 1:], num_steps=num_steps)
        means.append(float(out.loss_sums["cross_entropy"]) / (window.shape[1] - 1))
    losses = torch.tensor(means, dtype=torch.float64)
    mean = float(losses.mean())
    if not mean < _MOST_NATS:
        raise ValueError(
            f"the model's mean loss on the text is {mean:g} nats, which gives no perplexity (at most "
            f"{_MOST_NATS}); its weights are damaged, choose another checkpoint"
        )
    value = math.exp(mean)
    error = float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else math.nan
    return Perplexity(value, value * error, windows[:, 1:].numel())

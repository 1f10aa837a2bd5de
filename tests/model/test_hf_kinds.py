"""Imported folders of Llama, Mistral, Qwen2 and Qwen3 give transformers' logits on random configurations."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model import ZeroModel, load_pretrained
from model.cache import LatentCache
from model.hf.deepseek import import_folder

from .hf_folders import kin_folder

KINDS = ("llama", "mistral", "qwen2", "qwen3")
LENGTH = 40  # tokens of a row; the context first trained on is shorter, so that scaled rotations act
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 123.0},
    YARN,
    {**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.2},
    {**YARN, "factor": 1.0},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
)


def random_values(kind: str, seed: int) -> dict[str, Any]:
    """Odd sizes, all ratios of heads, tied or not, one kind of positions after another."""
    draw = random.Random(f"{kind}{seed}")
    groups, ratio = draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    heads, width = groups * ratio, draw.choice((4, 6, 10, 16))
    values = {
        "vocab_size": draw.choice((37, 64, 101)),
        "hidden_size": heads * draw.choice((5, 8)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "intermediate_size": draw.choice((17, 32)),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw.choice((1e-6, 1e-3)),
        "tie_word_embeddings": draw.choice((True, False)),
        "rope_parameters": {"rope_theta": 1000.0, **ROPES[seed % len(ROPES)]},
        "sliding_window": 64,  # never acts
    }
    return {name: value for name, value in values.items() if (kind, name) != ("llama", "sliding_window")}


def imported(kind: str, folder: Path, **values: Any) -> tuple[PreTrainedModel, ZeroModel]:
    theirs = kin_folder(kind, folder / "hf", **values)
    import_folder(folder / "hf", folder / "ours")
    return theirs, load_pretrained(folder / "ours")


def assert_same_logits(theirs: PreTrainedModel, ours: ZeroModel) -> None:
    """For whole rows, padded on the left, and read over a cache whole, token by token and in chunks."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ours.config.vocab_size, (3, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[1, : LENGTH - 1] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    expected = theirs(tokens, attention_mask=mask, position_ids=places).logits[real]
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    assert expected.std() > 0.05
    assert (ours(tokens, attention_mask=mask).logits[real] - expected).abs().max() <= limit
    cache, parts, end = LatentCache(), [], 0
    for part in tokens.split([20, *[1] * 8, 7, 5], 1):
        end += part.shape[1]
        parts.append(ours(part, attention_mask=mask[:, :end], cache=cache).logits)
    assert (torch.cat(parts, 1)[real] - expected).abs().max() <= limit


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    for seed in range(12):
        theirs, ours = imported(kind, tmp_path / str(seed), **random_values(kind, seed))
        assert_same_logits(theirs, ours)

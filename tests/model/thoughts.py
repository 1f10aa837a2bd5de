"""Small models with latent thoughts, and questions for them."""

from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig

from .conftest import SMALL, VARIANTS

PLAIN = {**VARIANTS["grouped_query"], "use_moe": False}
KINDS: dict[str, dict[str, Any]] = {
    "latent_moe": {},
    "plain": PLAIN,
    "gpt2": VARIANTS["gpt2"],
    "block": VARIANTS["loop"],
    "block_parallel": {**PLAIN, "recurrence": {**VARIANTS["loop"]["recurrence"], "cache": "parallel"}},
    "block_first": {"recurrence": {**VARIANTS["loop"]["recurrence"], "cache": "first"}},
    "kv": {"recurrence": {"placement": "kv", "num_steps": 2, "position_mixing": 3}},
    "post_attention": {**PLAIN, "recurrence": {"placement": "post_attention", "num_steps": 2}},
    "halting": {"recurrence": {**VARIANTS["loop"]["recurrence"], "halting": {"kind": "ponder"}}},
    "mixing": {**PLAIN, "embedding_mixing": 3},
}
FEEDBACKS: dict[str, dict[str, Any]] = {
    "jacobi": {"feedback": "jacobi", "num_iterations": 2},
    "sequential": {"feedback": "sequential"},
    "coconut": {"feedback": "sequential", "projection": "none"},
    "none": {"feedback": "none"},
    "lotus": {"feedback": "lotus", "num_iterations": 3},
}
BOT, EOT, C = 4, 5, 4


def make(kind: str, feedback: str = "jacobi", **execution: Any) -> ZeroModel:
    """A model in double precision, where rounding is small and finite differences are sharp."""
    thoughts = {"num_latents": C, **FEEDBACKS[feedback]}
    config = ModelConfig.from_dict({**SMALL, **KINDS[kind], "latent_cot": thoughts})
    return ZeroModel(config, seed=3, execution=ExecutionConfig(**execution)).double()


def questions(rows: int = 3, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(6, 61, (rows, length), generator=generator)
    tokens[:, -1] = BOT
    return tokens

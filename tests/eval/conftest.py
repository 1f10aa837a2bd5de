"""A tiny exported model with random weights, and the tokenizer it fits."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from eval.scoring.core import Scorer
from model import ModelConfig, RecurrenceConfig, ZeroModel

EVAL = Path(__file__).parents[2] / "eval"
TEXT = """Question: Which statement best explains why photosynthesis is the foundation of most food webs?
Answer: Sunlight is the source of energy for nearly all ecosystems.
Passage: Mary moved to the bathroom. John went to the hallway.\nQuestion: Where is Mary?\nAnswer: bathroom
Question: Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day. How much?\nAnswer: She makes $18.\n#### 18
A=3;B=A+2;C=B*2?C\nTrace: A=3;B=A+2=3+2=5;C=B*2=5*2=0;\nAnswer: 0 Straße 東京 naïve
"""


def tiny_config(vocab_size: int, max_position_embeddings: int = 4096) -> ModelConfig:
    # Large initial weights: the next tokens of a random model must differ clearly, or rounding decides.
    return ModelConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        initializer_range=0.3,
        recurrence=RecurrenceConfig(placement="block", ranges=[[1, 1]], num_steps=2),
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    return train_tokenizer([TEXT] * 4, vocab_size=360)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_bytes: bytes) -> Path:
    directory = tmp_path_factory.mktemp("run") / "export"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(tokenizer_bytes)
    vocab_size = Tokenizer(directory / "tokenizer.model").vocab_size
    ZeroModel(tiny_config(vocab_size)).save_pretrained(directory)
    return directory


@pytest.fixture
def make_scorer(checkpoint: Path) -> Callable[..., Scorer]:
    """Scorers over the same weights: only batch size and positions differ."""

    def make(batch_size: int = 4, max_length: int = 4096) -> Scorer:
        tokenizer = Tokenizer(checkpoint / "tokenizer.model")
        return Scorer(ZeroModel(tiny_config(tokenizer.vocab_size, max_length)), tokenizer, batch_size)

    return make


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a script of eval/ as __main__ in this process, which saves the seconds of importing torch."""

    def run(script: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EVAL / script), run_name="__main__")

    return run

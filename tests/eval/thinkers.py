"""Tiny models that think, a tokenizer of traced data, and questions for them."""

from collections import Counter
from pathlib import Path

import torch

from data_pipeline.tokenization.tokenizer import BOS_ID, BOT_ID, EOS_ID, EOT_ID, Tokenizer, train_tokenizer
from eval.thinking.tasks import QuestionSet, generated_questions
from model import ModelConfig, ZeroModel

C, T = 3, 2
SIZE = {"min_depth": 1, "max_depth": 4, "modulus": 7, "variables": 4, "statements": 6, "names": 26}
SMALL = {
    "max_position_embeddings": 160, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "intermediate_size": 48, "use_moe": False, "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "thinker": {
        "recurrence": {"placement": "block", "ranges": [[1, 1]], "num_steps": 2},
        "latent_cot": {"num_latents": C, "num_iterations": T},
    },
    "teacher": {"use_mla": False},
}


def write_tokenizer(folder: Path) -> Tokenizer:
    """One token a character."""
    folder.mkdir()
    data = generated_questions("causal_loop_v2", 20, 0, SIZE)
    texts = [question.reference.text for question in data.questions]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 308, "bpe", thought_pieces=True))
    return Tokenizer(folder / "tokenizer.model")


def write_random_model(folder: Path, kind: str) -> Path:
    """A checkpoint whose answers end at different lengths."""
    tokenizer = write_tokenizer(folder)
    config = ModelConfig.from_dict({**SMALL, **KINDS[kind], "vocab_size": tokenizer.vocab_size})
    model = ZeroModel(config, seed=5)
    prompts = torch.tensor([[BOS_ID, token, BOT_ID, EOT_ID] for token in range(270, 300)])
    written = Counter(model.generate(prompts, 12)[:, 4:].flatten().tolist())
    common = written.most_common(3)[-1][0]
    with torch.no_grad():  # eos is written where that token was
        model.lm_head.weight[[EOS_ID, common]] = model.lm_head.weight[[common, EOS_ID]]
    model.save_pretrained(folder)
    return folder


def encoded(tokenizer: Tokenizer, data: QuestionSet, *after: int) -> list[list[int]]:
    return [[BOS_ID, *tokenizer.encode(q.text), BOT_ID, *after] for q in data.questions]

"""One dial: from a size, a number of tokens and of GPUs to a model, its batch, learning rate and layout.

docs/SCALING.md has each rule with its source, and the range in which it was fitted.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model import ModelConfig
from model.counts import num_parameters, training_flops_per_token
from pretrain.planning.layout import Hardware
from pretrain.planning.search import LayoutPlan, search

Model = dict[str, Any]

BLOCK = 128  # every width is a multiple of it: FP8 scales blocks of 128, and a head is as wide
DENSE_BELOW = 500e6  # parameters; from there on a mixture of experts
LARGE_FROM = 4e9  # parameters; from there on rows of 4096 tokens of a vocabulary of 131,072
TOLERANCE = 0.05  # of a model's parameters, as a share of those asked for
TOKENS_PER_PARAMETER = 20
SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def read_count(text: str, flag: str) -> int:
    """`130M`, `1.5B` or `2e10` as a number.

    Raises:
        ValueError: it is none, or not from 1 to 1e15.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.strip(), re.IGNORECASE)
    number = float(found[1]) * SUFFIXES[found[2].upper()] if found else 0.0
    if not 1 <= number <= 1e15:
        raise ValueError(f"{flag} {text} is not a number from 1 to 1000T; write e.g. 130M, 1.5B or 20e9")
    return round(number)


@dataclass(frozen=True)
class Sized:
    """A model of a size, and the run that trains it."""

    size: str  # as asked for, such as 1B
    model: Model  # keys of ModelConfig that differ from its defaults
    tokens: int  # of the whole run
    sequence_length: int
    batch_tokens: float  # by the rule
    learning_rate: float

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.model)

    @property
    def looped(self) -> ModelConfig:
        return ModelConfig.from_dict({**self.model, "recurrence": loop_of(self.config.num_hidden_layers)})

    @property
    def name(self) -> str:
        """Of its files: 130m, 1b_moe."""
        return self.size.lower().replace(".", "_") + ("_moe" if self.config.use_moe else "")

    def rows(self, gpus: int) -> int:
        """Rows per step: the power of two per GPU that is nearest to the rule, at least one."""
        wanted = self.batch_tokens / self.sequence_length / gpus
        return gpus * 2 ** max(0, round(math.log2(wanted)))

    def steps(self, rows: int) -> int:
        return math.ceil(self.tokens / (rows * self.sequence_length))

    def plan(self, config: ModelConfig, gpus: int, hardware: Hardware, **fixed: Any) -> LayoutPlan:
        """The best layout on that many GPUs. Raises ValueError as search does."""
        given = {"sequence_length": self.sequence_length, **fixed, "gpus": gpus}
        return search(config, hardware, self.rows(gpus), given)


def sized(size: str, tokens: str | None = None) -> Sized:
    """The run of a size.

    Args:
        size: parameters in total, such as 1B.
        tokens: of the run, such as 20B; default: 20 per parameter.

    Raises:
        ValueError: not a number, or a size that no shape comes near; one line.
    """
    wanted = read_count(size, "--size")
    total = TOKENS_PER_PARAMETER * wanted if tokens is None else read_count(tokens, "--tokens")
    model = _shape(size, wanted)
    config, length = ModelConfig.from_dict(model), model["max_position_embeddings"]
    compute = compute_per_token(config, length) * total
    return Sized(size, model, total, length, batch_tokens(compute), learning_rate(compute))


def loop_of(layers: int) -> Model:
    """The section `recurrence` of the looped form: the middle half of the layers run twice.

    After SMELT (arXiv 2609.01343). The residual stream runs through both passes as through layers of tied
    weights; an embedding tells the second one apart, and its experts are chosen anew.
    """
    quarter = round(layers / 4)
    return {
        "placement": "block",
        "ranges": [[quarter, layers - 1 - quarter]],
        "num_steps": 2,
        "injection": "none",
        "update": "simple",
        "state_norm": False,
        "iteration_embedding": True,
    }


# ---- the shape


def _shape(size: str, wanted: int) -> Model:
    """The model whose feed-forward width relative to its width is nearest the family's."""
    found = [entry for layers in range(2, 101) for entry in _candidates(layers, wanted)]
    if not found:
        raise ValueError(f"--size {size}: no shape comes within {TOLERANCE:.0%} of it; choose 50M to 500B")
    return min(found, key=lambda entry: entry[0])[1]


def _candidates(layers: int, wanted: int) -> Iterator[tuple[float, Model]]:
    """Models of a depth that are near enough in size, with their distance from the family's shape and size.

    The family's own, and the one whose feed-forward width is solved for the size.
    """
    build = _dense if wanted < DENSE_BELOW else _experts
    model, key = build(layers, large=wanted >= LARGE_FROM)
    usual, now = model[key], _parameters(model)
    if not 0.4 < now / wanted < 2.5:
        return
    more = _parameters({**model, key: usual + BLOCK}) - now
    for width in {usual, usual + BLOCK * round((wanted - now) / more)}:
        error = abs((now + (width - usual) // BLOCK * more) / wanted - 1)
        if width > 0 and error <= TOLERANCE:
            yield abs(math.log(width / usual)) + error, {**model, key: width}


def _parameters(model: Model) -> int:
    return num_parameters(ModelConfig.from_dict(model))


def _blocks(width: float) -> int:
    return BLOCK * max(1, round(width / BLOCK))


def _attention(layers: int, aspect: int, large: bool) -> Model:
    """Vocabulary, depth, width and latent attention (DeepSeek-V2-Lite's heads of 128 + 64 numbers)."""
    width = _blocks(aspect * layers)
    return {
        "vocab_size": 131072 if large else 32768,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096 if large else 2048,
        "num_attention_heads": width // 128,
        "kv_lora_rank": min(512, _blocks(width / 4)),
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }


def _dense(layers: int, large: bool) -> tuple[Model, str]:
    """nanochat's dial, 64 numbers of width per layer, with SwiGLU of 8/3 of the width (Llama)."""
    model = _attention(layers, 64, large)
    wide = _blocks(model["hidden_size"] * 8 / 3)
    return {**model, "use_moe": False, "intermediate_size": wide}, "intermediate_size"


def _experts(layers: int, large: bool) -> tuple[Model, str]:
    """The shape of DeepSeek-V2-Lite, which at 27 layers it is: 64 experts top-6, two shared ones."""
    model = _attention(layers, 76, large)
    experts = {
        "intermediate_size": _blocks(model["hidden_size"] * 16 / 3),  # of the first layer, which is dense
        "first_k_dense_replace": 1,
        "moe_intermediate_size": _blocks(model["hidden_size"] * 11 / 16),
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
    }
    return {**model, **experts}, "moe_intermediate_size"


# ---- batch and learning rate


def compute_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs per token without the vocabulary's, attention in full (DeepSeek LLM, section 3.2)."""
    head = 6.0 * config.vocab_size * config.hidden_size
    return training_flops_per_token(config, sequence_length) - head


def batch_tokens(compute: float) -> float:
    """Tokens per step that DeepSeek LLM found best (arXiv 2401.02954, eq. 1); compute: FLOPs of the run."""
    return float(0.2920 * compute**0.3271)


def learning_rate(compute: float) -> float:
    """The peak learning rate of the same equation."""
    return float(0.3118 * compute**-0.1250)


def step_law(parameters: int, tokens: int) -> tuple[float, float]:
    """Learning rate and tokens per step of another fit (Step Law, arXiv 2503.04715, eq. 1).

    Args:
        parameters: all but the vocabulary's; of a mixture all experts' count.
    """
    return float(1.79 * parameters**-0.713 * tokens**0.307), float(0.58 * tokens**0.571)

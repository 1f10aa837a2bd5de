"""Contexts longer than the one first trained on: how RoPE's rotations slow down."""

from dataclasses import dataclass
from typing import Annotated, Literal

from common.schema import Count, Limits, Weight

Factor = Annotated[float, Limits(least=1, most=10**6)]
Turns = Annotated[float, Limits(above=0, most=10**6)]


@dataclass(frozen=True)
class YarnConfig:
    """A context longer than the one first trained on (YaRN, arXiv 2309.00071); DeepSeek-V3's defaults."""

    factor: Factor = 40.0  # how many times longer
    original_max_position_embeddings: Count = 4096  # the context first trained on, in tokens
    beta_fast: Turns = 32.0  # pairs that turn more often than this in the old context keep their speed
    beta_slow: Turns = 1.0  # pairs that turn less often than this are slowed down by `factor`
    mscale: Weight = 1.0  # temperature of the rotated part of query and key
    mscale_all_dim: Weight = 1.0  # temperature of the whole score; 0: none


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama 3.1's way to a longer context, with its names and values; chosen by rope_type."""

    rope_type: Literal["llama3"] = "llama3"
    factor: Factor = 8.0  # how many times slower the slow pairs turn
    low_freq_factor: Turns = 1.0  # pairs that turn less often than this in the old context are slowed down
    high_freq_factor: Turns = 4.0  # pairs that turn more often than this keep their speed
    original_max_position_embeddings: Count = 8192  # the context first trained on, in tokens


def check_rope_scaling(scaling: YarnConfig | Llama3RopeConfig | None) -> None:
    """Raises ValueError for impossible values."""
    if isinstance(scaling, YarnConfig) and scaling.beta_slow >= scaling.beta_fast:
        raise ValueError(
            f"model.rope_scaling has beta_fast={scaling.beta_fast} and beta_slow={scaling.beta_slow}; the "
            "first must be above the second"
        )
    if isinstance(scaling, Llama3RopeConfig) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"model.rope_scaling has low_freq_factor={scaling.low_freq_factor} and high_freq_factor="
            f"{scaling.high_freq_factor}; the first must be below the second"
        )

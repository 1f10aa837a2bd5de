"""Contexts longer than the one first trained on: how RoPE's rotations slow down."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class YarnConfig:
    """A context longer than the one first trained on (YaRN, arXiv 2309.00071); DeepSeek-V3's defaults."""

    factor: float = 40.0  # how many times longer
    original_max_position_embeddings: int = 4096  # the context first trained on, in tokens
    beta_fast: float = 32.0  # pairs that turn more often than this in the old context keep their speed
    beta_slow: float = 1.0  # pairs that turn less often than this are slowed down by `factor`
    mscale: float = 1.0  # temperature of the rotated part of query and key
    mscale_all_dim: float = 1.0  # temperature of the whole score; 0: none


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama 3.1's way to a longer context, with its names and values; chosen by rope_type."""

    rope_type: str = "llama3"
    factor: float = 8.0  # how many times slower the slow pairs turn
    low_freq_factor: float = 1.0  # pairs that turn less often than this in the old context are slowed down
    high_freq_factor: float = 4.0  # pairs that turn more often than this keep their speed
    original_max_position_embeddings: int = 8192  # the context first trained on, in tokens


def rope_section(values: dict[str, Any]) -> type:
    """The class of a config's section `rope_scaling`."""
    return Llama3RopeConfig if values.get("rope_type") == "llama3" else YarnConfig


def check_rope_scaling(scaling: YarnConfig | Llama3RopeConfig | None) -> None:
    """Raises ValueError for impossible values."""
    if scaling is not None and (scaling.factor < 1 or scaling.original_max_position_embeddings < 1):
        raise ValueError(
            f"model.rope_scaling has factor={scaling.factor} and original_max_position_embeddings="
            f"{scaling.original_max_position_embeddings}; both must be at least 1"
        )
    if isinstance(scaling, Llama3RopeConfig) and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"model.rope_scaling has low_freq_factor={scaling.low_freq_factor} and high_freq_factor="
            f"{scaling.high_freq_factor}; the first must be above 0 and below the second"
        )

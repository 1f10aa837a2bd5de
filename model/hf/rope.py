"""How the positions of a Hugging Face folder turn, as `rope_theta` and `rope_scaling` of a ModelConfig.

Formulas and defaults follow transformers' modeling_rope_utils.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from common.schema import as_type, from_plain
from model.config.rope import Llama3RopeConfig, YarnConfig
from model.hf.files import FIX

ORIGINAL_LENGTH = "original_max_position_embeddings"
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH)
_YARN_KEYS = tuple(field.name for field in dataclasses.fields(YarnConfig))
_YARN_ABSENT: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}

Rope = tuple[float, dict[str, Any] | None]  # base, and the section rope_scaling


def deepseek_rope(values: dict[str, Any]) -> Rope:
    """Of DeepSeek-V3, whose yarn scales attention too.

    Raises:
        ValueError: a kind of scaling that this network does not compute, or a key is missing.
    """
    theta, kind, rope = _parameters(values)
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"config.json scales positions by rope_type={kind!r}; only yarn is read")
    return theta, _yarn(rope)


def llama_rope(values: dict[str, Any]) -> Rope:
    """Of Llama and its kin. Raises ValueError as deepseek_rope does."""
    theta, kind, rope = _parameters(values)
    if kind == "default":
        return theta, None
    if kind == "llama3":
        _check_present(rope, _LLAMA3_KEYS)
        return theta, dataclasses.asdict(from_plain(Llama3RopeConfig, rope, "config.json: rope_scaling"))
    if kind != "yarn":
        raise ValueError(
            f"config.json scales positions by rope_type={kind!r}, which this network does not compute; only "
            "llama3 and yarn are read"
        )
    named = rope.pop("attention_factor", None)
    yarn = _yarn(rope)
    factor = as_type(float | None, named, "config.json: rope_scaling.attention_factor")
    return theta, {**yarn, **_temperatures(YarnConfig(**yarn), factor)}


def _parameters(values: dict[str, Any]) -> tuple[float, str, dict[str, Any]]:
    """Base, kind and further values of `rope_parameters` (transformers 5), or of `rope_theta` and
    `rope_scaling` (earlier).

    Raises:
        ValueError: one of them has another type, or only a part of a head is rotated.
    """
    name = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    rope = dict(as_type(dict[str, Any], values.get(name) or {}, f"config.json: {name}"))
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rotated = rope.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise ValueError(
            f"config.json has partial_rotary_factor={rotated!r}, but heads are rotated whole here (1.0); "
            "choose another checkpoint"
        )
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(
            f"config.json: {name} has a section {nested[0]!r}, but all layers turn alike here; choose "
            "another checkpoint"
        )
    if values.get(ORIGINAL_LENGTH) is not None:  # has priority in transformers
        rope[ORIGINAL_LENGTH] = values[ORIGINAL_LENGTH]
    return (
        as_type(float, theta, "config.json: rope_theta"),
        as_type(str, kind, f"config.json: {name}.rope_type"),
        rope,
    )


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    if rope.pop("truncate", True) is not True:
        raise ValueError(
            "config.json scales positions by yarn with truncate=false, but the ramp's ends are rounded here; "
            "choose another checkpoint"
        )
    if odd := sorted(set(rope) - set(_YARN_KEYS)):
        raise ValueError(
            f"config.json scales positions by keys {', '.join(odd)}; only yarn with "
            f"{', '.join(_YARN_KEYS)} is read"
        )
    given = {key: value for key, value in rope.items() if value is not None}
    _check_present(given, ("factor", ORIGINAL_LENGTH))
    return dataclasses.asdict(from_plain(YarnConfig, _YARN_ABSENT | given, "config.json: rope_scaling"))


def _temperatures(yarn: YarnConfig, attention_factor: float | None) -> dict[str, float]:
    """mscale and mscale_all_dim by which a wholly rotated head's scores are scaled as by `attention_factor`.

    There queries and keys are multiplied by the factor; here the scores are, by (0.1 mscale ln(factor) + 1)^2
    (YaRN, arXiv 2309.00071, eq. 22).

    Args:
        attention_factor: None: what transformers computes from the other keys.

    Raises:
        ValueError: the factor is not above 1, so that no temperature gives it.
    """
    own = {"mscale": 0.0, "mscale_all_dim": 0.0}  # the paper's: 0.1 ln(factor) + 1 on queries and keys
    growth = 0.1 * math.log(yarn.factor)
    if attention_factor is None:
        if not (yarn.mscale and yarn.mscale_all_dim):
            return own
        attention_factor = (growth * yarn.mscale + 1) / (growth * yarn.mscale_all_dim + 1)
    if math.isclose(attention_factor, growth + 1, rel_tol=1e-7):
        return own
    if not (growth and attention_factor > 1):
        raise ValueError(
            f"config.json scales positions by yarn with factor={yarn.factor:g} and attention_factor="
            f"{attention_factor:g}; both must be above 1, choose another checkpoint"
        )
    mscale = (attention_factor - 1) / growth
    return {"mscale": mscale, "mscale_all_dim": mscale}


def _check_present(rope: dict[str, Any], needed: Sequence[str]) -> None:
    """Raises ValueError if a key is missing; our default would be another model's."""
    missing = [name for name in needed if name not in rope]
    if missing:
        raise ValueError(f"config.json scales positions, but does not say {', '.join(missing)}; {FIX}")

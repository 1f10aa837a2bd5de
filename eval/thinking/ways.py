"""The ways to answer that a command line asks for, and how results name them."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from eval.scoring.kv_flags import ALL, KVFlags, kv_settings
from eval.thinking.answers import Way
from model import ModelConfig


class WayFlags(NamedTuple):
    """The flags that say how to answer; None: the checkpoint's own."""

    mode: str | None = None
    num_latents: list[int] | None = None
    num_iterations: list[int] | None = None
    tolerance: float = 0.0
    replace: str | None = None
    kv_budget: list[int | None] | None = None
    kv_buffer: int | None = None
    kv_lambda: float | None = None
    kv_window: int | None = None


def ways(flags: WayFlags, config: ModelConfig, batch_size: int, samples: int) -> list[Way]:
    """All ways to answer that were asked for. Raises ValueError for flags that do not go together."""
    has_latents = config.latent_cot.num_latents > 0
    mode = flags.mode or ("thoughts" if has_latents else "cot")
    given = {**flags._asdict(), "samples": samples}
    of_mode = {
        "thoughts": ("num_latents", "num_iterations", "tolerance", "replace"),
        "cot": (*KVFlags._fields, "samples"),
    }
    for needed, names in of_mode.items():
        for name in names:
            if mode != needed and given[name]:
                raise ValueError(
                    f"--{name} {_text(given[name])} is for --mode {needed}, but the mode is {mode}:"
                    " leave it out or change --mode"
                )
    if mode == "thoughts" and not has_latents:
        raise ValueError("--mode thoughts: the checkpoint has no latent thoughts; choose cot or none")
    limits = KVFlags(*(given[name] for name in KVFlags._fields)).limits()
    if flags.replace == "shuffled" and batch_size < 2:
        raise ValueError(
            "--replace shuffled takes another question's latents: --batch_size must be 2 or more"
        )
    if mode == "cot":
        return [Way(mode) if limit is None else Way(mode, **kv_settings(limit)) for limit in limits]
    if mode == "none":
        return [Way(mode)]
    latents: Sequence[int | None] = flags.num_latents or [None]
    iterations: Sequence[int | None] = flags.num_iterations or [None]
    return [Way(mode, c, t, flags.tolerance, flags.replace) for c, t in product(latents, iterations)]


def _text(value: Any) -> str:
    parts = value if isinstance(value, list) else [value]
    return ",".join(ALL if part is None else str(part) for part in parts)


def mark(way: Way, config: ModelConfig) -> str:
    """The suffix of a result's name that distinguishes the way from the checkpoint's own."""
    own = "thoughts" if config.latent_cot.num_latents else "cot"
    parts = [] if way.mode == own else [f"mode={way.mode}"]
    defaults = Way(way.mode)
    for name in Way._fields[1:]:
        value = getattr(way, name)
        if value != getattr(defaults, name):
            parts.append(f"{name}={value}")
    return "@" + ",".join(parts) if parts else ""


def settings(way: Way, config: ModelConfig) -> dict[str, Any]:
    """What `configs` says of a way, with the checkpoint's own numbers where none were given."""
    c = config.latent_cot
    found: dict[str, Any] = {**way._asdict(), "feedback": None}
    if way.kv_budget is None:
        found |= dict.fromkeys(KVFlags._fields)
    if way.mode == "thoughts":
        own_iterations = c.iterations or None
        found |= {
            "feedback": c.feedback,
            "num_latents": way.num_latents or c.num_latents,
            "num_iterations": own_iterations if way.num_iterations is None else way.num_iterations,
        }
    found["method"] = None if config.distillation is None else config.distillation.method
    return found

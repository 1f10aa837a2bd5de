"""Every loop that the config allows, for tests that must hold for all of them."""

import itertools
from typing import Any

from model import ModelConfig

from .conftest import SMALL

PLACEMENTS = ("kv", "post_attention", "block")
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "fixed"},
    {"kind": "act"},
    {"kind": "ponder"},
    {"kind": "entropy"},
    {"kind": "threshold", "measure": "cosine"},
    {"kind": "threshold", "measure": "kl"},
    {"kind": "act", "expectation": "loss"},
    {"kind": "ponder", "expectation": "state"},
)
GRANULARITIES = ("token", "sequence", "mixed")
CACHES = ("per_step", "parallel", "ema", "average", "last", "first")
INJECTIONS = ("none", "add", "concat", "gate")
EXACT = ("per_step", "parallel", "first")


def loop(
    placement: str, halting: dict[str, Any], granularity: str, cache: str, number: int
) -> dict[str, Any]:
    """A recurrence section; the other switches rotate with `number`."""
    adaptive = {} if halting["kind"] == "fixed" else {"granularity": granularity, "threshold": 0.9}
    section: dict[str, Any] = {
        "placement": placement,
        "num_steps": 4,
        "halting": {**halting, **adaptive},
        "injection": INJECTIONS[number % 4],
        "update": ("gated", "simple")[number // 2 % 2],
        "iteration_embedding": number % 3 == 0,
        "state_norm": number % 5 < 3,
    }
    if placement == "block":
        section |= {"ranges": [[1, 1]], "cache": cache, "sandwich_norm": number % 2 == 0}
        if halting.get("expectation") == "state" and number % 2:
            section["ranges"] = [[0, 0], [2, 2]]
    else:
        section |= {
            "ranges": [[0, 1]],
            "position_mixing": (0, 3)[number % 2],
            "query_conditioned": number % 3 != 1,
            "k_rope_source": ("hidden", "latent", "hidden_plus_latent")[number % 3]
            if placement == "kv"
            else None,
        }
    return section


def admitted(section: dict[str, Any]) -> bool:
    try:
        ModelConfig.from_dict({**SMALL, "recurrence": section})
    except ValueError:
        return False
    return True


def every_loop() -> dict[str, dict[str, Any]]:
    """placement x halting x granularity x cache, as far as the config allows."""
    found = {}
    product = itertools.product(PLACEMENTS, KINDS, GRANULARITIES, CACHES)
    for number, (placement, halting, granularity, cache) in enumerate(product):
        if placement != "block" and cache != "per_step":
            continue  # refused, see test_recurrence_config.py
        if halting["kind"] == "fixed" and granularity != "token":
            continue  # granularity does nothing
        section = loop(placement, halting, granularity, cache, number)
        if admitted(section):
            name = "-".join([placement, *map(str, halting.values()), granularity, cache])
            found[name] = section
    return found


EVERY = every_loop()


def covering() -> list[str]:
    """A subset that contains every pair of values of any two of the four switches."""
    chosen: list[str] = []
    seen: set[tuple[int, str, int, str]] = set()

    def pairs(name: str) -> set[tuple[int, str, int, str]]:
        placement, *halting, granularity, cache = name.split("-")
        values = (placement, "-".join(halting), granularity, cache)
        return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(4), 2)}

    while True:
        best = max(EVERY, key=lambda name: len(pairs(name) - seen))
        if not pairs(best) - seen:
            return chosen
        chosen.append(best)
        seen |= pairs(best)


COVERING = covering()

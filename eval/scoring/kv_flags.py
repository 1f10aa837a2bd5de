"""The flags by which R-KV cuts the cache of a generated answer: the kv_ options of model.generate."""

import argparse
import math
from typing import Any, NamedTuple

from eval.scoring.cli import positive_integer
from model.latent_cot.rkv import BUFFER, IMPORTANCE_SHARE, OBSERVATION_WINDOW, CacheLimit

ALL = "all"


class KVFlags(NamedTuple):
    """What the command line says; None: not given."""

    kv_budget: list[int | None] | None = None  # a None in it: all tokens are kept
    kv_buffer: int | None = None
    kv_lambda: float | None = None
    kv_window: int | None = None

    def limits(self) -> list[CacheLimit | None]:
        """One for each budget, [None] without any. Raises ValueError for another flag without a budget."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        budgets: list[int | None] = given.pop("kv_budget", [None])
        if given and not any(budgets):
            name, value = next(iter(given.items()))
            raise ValueError(f"--{name} {value} belongs to --kv_budget: give both or neither")
        options = {("lambda_" if name == "kv_lambda" else name[3:]): value for name, value in given.items()}
        return [None if budget is None else CacheLimit(budget, **options) for budget in budgets]


def kv_settings(limit: CacheLimit | None) -> dict[str, Any]:
    """By flag; None: all tokens are kept."""
    values = (None,) * 4 if limit is None else limit
    return dict(zip(KVFlags._fields, values, strict=True))


def limit_mark(limit: CacheLimit | None) -> str:
    """The suffix of a result's name: the budget, and what is not the default."""
    if limit is None:
        return ""
    usual = kv_settings(CacheLimit(limit.budget)) | {"kv_budget": None}
    parts = [f"{name}={value}" for name, value in kv_settings(limit).items() if value != usual[name]]
    return "@" + ",".join(parts)


def budgets(text: str) -> list[int | None]:
    """An argparse type: different numbers from 1, or `all`."""
    parts = [part.strip() for part in text.split(",")]
    values = [None if part == ALL else int(part) if part.isdecimal() else 0 for part in parts]
    if len(set(values)) < len(values) or any(value is not None and value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"is {text}, different numbers from 1 or {ALL} are needed: {ALL},64")
    return values


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text}, a finite number is needed: 0.1")
    return value


KV_FLAGS: dict[str, dict[str, Any]] = {
    "--kv_budget": {
        "type": budgets,
        "metavar": "N,..",
        "help": f"generated tokens whose keys and values R-KV keeps, one number or several, {ALL}: everything"
        f" (default: {ALL})",
    },
    "--kv_buffer": {
        "type": positive_integer,
        "metavar": "N",
        "help": f"tokens between two cuts of the cache (default: {BUFFER})",
    },
    "--kv_lambda": {
        "type": finite,
        "metavar": "X",
        "help": "share of importance in R-KV's score, the rest is redundancy's"
        f" (default: {IMPORTANCE_SHARE:g})",
    },
    "--kv_window": {
        "type": positive_integer,
        "metavar": "N",
        "help": f"last tokens, which judge the others and always stay (default: {OBSERVATION_WINDOW})",
    },
}

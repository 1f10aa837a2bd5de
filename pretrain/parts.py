"""Weights as they arrive when they are gathered or read one after another."""

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """A tensor, or some of its rows."""

    name: str
    value: Tensor
    row: int | None = None  # the first of the rows that `value` is; None: it is the whole tensor

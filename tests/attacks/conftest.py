"""Fixtures of the other rooms' tests: real launches, and the tiny exported model of the evaluations."""

from ..eval.conftest import checkpoint, make_scorer, one_thread, tokenizer_bytes
from ..pretrain.conftest import begin, launch, six_steps, train

__all__ = [
    "begin",
    "checkpoint",
    "launch",
    "make_scorer",
    "one_thread",
    "six_steps",
    "tokenizer_bytes",
    "train",
]

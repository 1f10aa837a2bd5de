"""The tiny exported model of the evaluation's tests."""

from ..eval.conftest import checkpoint, make_scorer, one_thread, tokenizer_bytes

__all__ = ["checkpoint", "make_scorer", "one_thread", "tokenizer_bytes"]

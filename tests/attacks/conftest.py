"""Real launches, as in tests/pretrain/."""

from ..pretrain.conftest import begin, launch, six_steps, train

__all__ = ["begin", "launch", "six_steps", "train"]

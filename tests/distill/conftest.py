"""Real launches, as those of pretrain/."""

from ..pretrain.conftest import launch

__all__ = ["launch"]

"""Which optimizer steps to skip: those whose loss or gradient is not finite, and spikes."""

import math

import torch
from torch import Tensor

from pretrain.config import StabilityConfig

MAD_TO_STD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class SpikeGuard:
    """Judges a step by its loss and gradient norm, which are equal on all ranks, without reading the device.

    A spike is a value whose robust z-score, (x - median) / (1.4826 MAD) over the last `window` finite steps,
    exceeds `max_zscore`. The norm is compared by its logarithm. Only high values count, and none while the
    MAD is 0. Everything finite passes until `window` / 2 steps have been seen. Spikes enter the history too:
    whatever lasts longer than half a window is a new level that the weights have reached, not a bad batch.

    `history` (2, window) fp32, oldest first, NaN where nothing was seen yet: part of a checkpoint.
    """

    def __init__(self, config: StabilityConfig, device: torch.device) -> None:
        self.config = config
        self.history = torch.full((2, config.window), math.nan, device=device)
        self.zscores = torch.zeros(2, device=device)

    def forget(self) -> None:
        """For a change of loss, after which the old level says nothing about spikes."""
        self.history.fill_(math.nan)

    @torch.no_grad()
    def refuses(self, loss: Tensor, grad_norm: Tensor, comparable: Tensor | bool = True) -> Tensor:
        """Scalars -> a boolean scalar, True: skip this step. Finite values enter the history.

        Args:
            comparable: False for a step whose level says nothing about others, as one without targets: it is
                no spike and does not enter the history.
        """
        grad_norm = grad_norm.to(self.history)  # with offload it comes from host memory
        values = torch.stack((loss.to(self.history), grad_norm.log()))
        finite = values[0].isfinite() & grad_norm.isfinite()
        refused = ~finite
        if self.config.max_zscore is not None:
            median = self.history.nanmedian(1).values
            spread = MAD_TO_STD * (self.history - median[:, None]).abs().nanmedian(1).values
            self.zscores = (values - median) / spread
            known = 2 * (~self.history[0].isnan()).sum() >= self.config.window
            spikes = (self.zscores > self.config.max_zscore) & (spread > 0)
            refused = refused | (known & spikes.any() & comparable)
        longer = torch.cat((self.history[:, 1:], values[:, None]), 1)
        self.history.copy_(torch.where(finite & comparable, longer, self.history))
        return refused

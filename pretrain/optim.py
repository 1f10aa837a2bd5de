"""The learning-rate schedule."""

import math

from pretrain.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then cosine to min_lr or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = max(config.decay_steps or max_steps, config.warmup_steps + 1)
    progress = min((step - config.warmup_steps) / (end - config.warmup_steps), 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

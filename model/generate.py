"""Batched greedy generation over the latent cache.

Shapes: B batch, T prompt tokens, n new tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import LatentCache

if TYPE_CHECKING:
    from .transformer import ZeroModel

PAD_TOKEN_ID = 0


def generate(
    model: "ZeroModel",
    tokens: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    stopping: Callable[[Tensor], Tensor] | None = None,
    num_steps: int | None = None,
) -> Tensor:
    """Continues every row with its most likely token until all rows have ended.

    Args:
        tokens: (B, T) int64, shorter prompts padded on the LEFT.
        attention_mask: (B, T), 1 where a token is real; default: all.
        eos_token_id: ends a row; what follows it is PAD_TOKEN_ID.
        stopping: called with the new tokens (B, n), returns (B,) booleans of rows to end.
        num_steps: loop steps; default: the config's.

    Returns:
        (B, T + n) prompt and continuation, n <= max_new_tokens.

    Raises:
        ValueError: prompt and continuation exceed max_position_embeddings.
    """
    limit = model.config.max_position_embeddings
    if tokens.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {tokens.shape[1]} and max_new_tokens={max_new_tokens} exceed "
            f"max_position_embeddings={limit}; shorten one of them"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(tokens)
    prompt_length, cache, step_input = tokens.shape[1], LatentCache(), tokens
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        logits = model(step_input, attention_mask=attention_mask, num_steps=num_steps, cache=cache).logits
        step_input = logits[:, -1:].argmax(-1).masked_fill(ended[:, None], PAD_TOKEN_ID)
        tokens = torch.cat((tokens, step_input), 1)
        attention_mask = torch.cat((attention_mask, (~ended[:, None]).to(attention_mask.dtype)), 1)
        if eos_token_id is not None:
            ended = ended | (step_input[:, 0] == eos_token_id)
        if stopping is not None:
            ended = ended | stopping(tokens[:, prompt_length:])
        if bool(ended.all()):
            break
    return tokens

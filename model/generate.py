"""Batched generation over the latent cache.

Shapes: B batch, T prompt tokens, n new tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.cache import LatentCache
from model.config.recurrence import HaltingConfig
from model.interface import LanguageModel
from model.latent_cot.rkv import BUFFER, IMPORTANCE_SHARE, OBSERVATION_WINDOW, CacheCompressor, CacheLimit

PAD_TOKEN_ID = 0


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    stopping: Callable[[Tensor], Tensor] | None = None,
    num_steps: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    kv_budget: int | None = None,
    kv_buffer: int = BUFFER,
    kv_lambda: float = IMPORTANCE_SHARE,
    kv_window: int = OBSERVATION_WINDOW,
    cache: LatentCache | None = None,
    halting: HaltingConfig | None = None,
) -> Tensor:
    """Continues all rows until every row has ended.

    Args:
        tokens: (B, T) int64, shorter prompts padded on the LEFT.
        attention_mask: (B, T), 1 where a token is real; default: all.
        eos_token_id: ends a row; PAD_TOKEN_ID follows.
        stopping: called with the new tokens (B, n); returns (B,) booleans, True for rows to end.
        num_steps: loop steps; default: the config's.
        temperature: 0 takes the most likely token, other values divide the logits before sampling.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together reach this probability (nucleus sampling,
            Holtzman et al. 2020), taken after top_k.
        seed: for sampling.
        kv_budget: generated tokens that the cache keeps besides the prompt, chosen by R-KV (see rkv.py);
            None: all.
        kv_buffer: further tokens that the cache may hold before it is cut to the budget.
        kv_lambda: share of importance in R-KV's score; 1 ignores redundancy, 0 ignores importance.
        kv_window: last tokens whose queries judge the others, and which always stay.
        cache: holds what precedes `tokens`, extended in place; attention_mask covers that too.
        halting: in place of the config's; see ZeroModel.forward.

    Returns:
        (B, T + n) prompt and continuation, n <= max_new_tokens.

    Raises:
        ValueError: prompt and continuation exceed max_position_embeddings, or an impossible option.
    """
    cache = LatentCache() if cache is None else cache
    check_length(model, tokens, max_new_tokens, cache.length // model.config.positions_per_token)
    choose = _chooser(temperature, top_k, top_p, seed, tokens.device)
    attention_mask = without_padding(attention_mask)
    prompt_length, step_input, position_ids = tokens.shape[1], tokens, None
    compressor = None
    if kv_budget is not None:
        if cache.length:
            raise ValueError(
                f"kv_budget={kv_budget} is for generating from a prompt, but a cache of {cache.length} "
                "tokens is given too; leave one of them out"
            )
        limit = CacheLimit(kv_budget, kv_buffer, kv_lambda, kv_window)
        prompt = torch.ones_like(tokens) if attention_mask is None else attention_mask
        compressor = CacheCompressor(model, prompt, cache, limit, halting)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        output = model(
            step_input,
            attention_mask=attention_mask,
            position_ids=position_ids,
            num_steps=num_steps,
            cache=cache,
            logits_to_keep=1,
            halting=halting,
        )
        if compressor is not None:
            attention_mask = compressor.after_pass(attention_mask)
            position_ids = compressor.next_position()
        assert output.logits is not None
        step_input = choose(output.logits[:, -1]).masked_fill(ended[:, None], PAD_TOKEN_ID)
        tokens = torch.cat((tokens, step_input), 1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, (~ended[:, None]).to(attention_mask.dtype)), 1)
        if eos_token_id is not None:
            ended = ended | (step_input[:, 0] == eos_token_id)
        if stopping is not None:
            ended = ended | stopping(tokens[:, prompt_length:])
        if (eos_token_id is not None or stopping is not None) and bool(ended.all()):
            break
    return tokens


def check_length(model: LanguageModel, tokens: Tensor, max_new_tokens: int, held: int = 0) -> None:
    """Refuses a prompt (B, T) after `held` cached tokens whose continuation would be too long."""
    limit = model.config.max_position_embeddings
    if tokens.shape[1] < 1 or max_new_tokens < 0:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} tokens and max_new_tokens={max_new_tokens}: the prompt needs at "
            "least 1 token and max_new_tokens may not be negative"
        )
    if held + tokens.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {held + tokens.shape[1]} and max_new_tokens={max_new_tokens} exceed "
            f"max_position_embeddings={limit}; shorten one of them"
        )


def without_padding(attention_mask: Tensor | None) -> Tensor | None:
    """None for a mask that masks nothing: a batch without padding needs no mask."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, seed: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The function from logits (B, V) to tokens (B, 1)."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in 0 < top_p <= 1")
    if temperature == 0:
        return lambda logits: logits.argmax(-1, keepdim=True)
    generator = torch.Generator(device).manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        kept = truncated(logits.float() / temperature, top_k, top_p)
        return torch.multinomial(kept.softmax(-1), 1, generator=generator)

    return sample


def truncated(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (B, V) with -inf for the tokens outside top_k or top_p; the most likely one always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside.scatter_(-1, logits.topk(top_k, dim=-1).indices, False)
        logits = logits.masked_fill(outside, float("-inf"))
    if top_p is not None:
        likely, order = logits.sort(dim=-1, descending=True)
        probabilities = likely.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits

"""R-KV: which tokens of a KV cache to keep (arXiv 2505.24133, section 3; github.com/Zefan-Cai/R-KV, rkv/).

A token's score is lambda I - (1 - lambda) R: what recent queries attend to is important (I), what later keys
repeat is redundant (R). Two uses: compressing the cache while generating (CacheCompressor), and choosing the
tokens of a chain of thought that a student distils (select; KaVa, arXiv 2510.02312).

Where the paper and its code differ or say nothing:
- lambda is the paper's 0.1; the code's default is 0.07.
- From the code: of a key's similar neighbours (cosine above 0.5) the latest is zeroed; attention is
  max-pooled over 7 candidates after the mean over queries; the maximum over the query heads of a group is
  taken of the logits; keys are compared as the cache holds them, rotated.
- A key without a similar neighbour has nothing zeroed. The code then zeroes its similarity to the first key,
  a side effect of how it looks the neighbour up.
- The whole prompt stays, so I and R are formed over the generated tokens alone.

Shapes: B batch, T queries, S candidates, H query heads, G key-value heads (latent attention: H), K key width,
W numbers per cached token, n kept.
"""

from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LatentCache, Slot
from model.config.model import ModelConfig
from model.config.recurrence import HaltingConfig
from model.interface import LanguageModel
from model.layers import at_least_fp32, rotate, rotations

OBSERVATION_WINDOW = 8  # last tokens: their queries judge the others, and they always stay
BUFFER = 128  # tokens between two cuts
POOL = 7  # neighbouring candidates, all of which get the largest attention among them
SIMILAR = 0.5  # cosine above which two keys count as repeats
IMPORTANCE_SHARE = 0.1  # lambda
POLICIES = ("rkv", "random", "uniform")


class CacheLimit(NamedTuple):
    """How R-KV limits a cache while generating: the kv_ options of model.generate."""

    budget: int  # generated tokens to keep
    buffer: int = BUFFER  # tokens to generate between two cuts
    lambda_: float = IMPORTANCE_SHARE  # share of importance in the score; the rest goes to redundancy
    window: int = OBSERVATION_WINDOW  # last tokens: their queries judge the others, and they always stay


def importance(
    query: Tensor, keys: Tensor, mask: Tensor, query_mask: Tensor, scale: float, pool: int = POOL
) -> Tensor:
    """Attention of the queries to the candidates alone: (B, G, S), 0 where no query is real.

    Args:
        query: (B, T, H, K), rotated like the keys; all queries come after all candidates.
        keys: (B, S, G, K); H a multiple of G.
        mask: (B, S) booleans, False for padding, which gets no attention.
        query_mask: (B, T) booleans, False for padding, which the mean leaves out.
        scale: factor on query-key products.
        pool: width of the max-pool over candidates, odd; 1: none.
    """
    grouped = at_least_fp32(query).unflatten(2, (keys.shape[2], -1))
    logits = scale * torch.einsum("btgnk,bsgk->bgnts", grouped, at_least_fp32(keys)).amax(2)
    weights = _softmax(logits, mask[:, None, None]) * query_mask[:, None, :, None]
    mean = weights.sum(2) / query_mask.sum(1).clamp(min=1)[:, None, None]
    return F.max_pool1d(mean, pool, stride=1, padding=pool // 2)


def redundancy(keys: Tensor, mask: Tensor) -> Tensor:
    """How much the other keys resemble each key: (B, G, S), sums to 1 over a row's real candidates.

    The latest of the keys that resemble a key does not count: the last copy of a repetition stays.

    Args:
        keys: (B, S, G, K).
        mask: (B, S) booleans, False for padding, which is neither compared nor counted.
    """
    unit = F.normalize(at_least_fp32(keys), dim=-1).transpose(1, 2)
    index = torch.arange(keys.shape[1], device=keys.device)
    compared = mask[:, None, :, None] & mask[:, None, None, :] & (index != index[:, None])
    cosine = (unit @ unit.mT).masked_fill(~compared, 0)
    latest = torch.where(cosine > SIMILAR, index, -1).amax(-1, keepdim=True)
    cosine = cosine.masked_fill(index == latest, 0)
    mean = cosine.sum(-2) / mask.sum(1).clamp(min=1)[:, None, None]
    return _softmax(mean, mask[:, None])


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension's real entries; 0 elsewhere, and in rows without real entries."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1) * mask


def select(
    importance: Tensor,
    keys: Tensor,
    mask: Tensor,
    budget: int,
    lambda_: float = IMPORTANCE_SHARE,
    policy: str = "rkv",
    seed: int = 0,
    shared: bool = False,
) -> Tensor:
    """The candidates to keep.

    Args:
        importance: (B, G, S), larger is kept longer; only policy rkv reads it.
        keys: (B, S, G, K), compared to each other; the other policies only read the shape.
        mask: (B, S) booleans, False: padding.
        budget: candidates to keep per row and head.
        lambda_: share of importance in the score; the rest goes to redundancy.
        policy: rkv | random | uniform (evenly spaced over the row's real candidates). The last two do not
            depend on padding, on a row's index in the batch or on the batch's size.
        seed: for policy random; every row gets the same draws, so it should change with the step.
        shared: one choice for all heads, by their mean score.

    Returns:
        (B, G, n) int64, or (B, 1, n) if shared, n = min(budget, S), in temporal order. If a row has fewer
        real candidates than n, they come first and padding follows; the caller masks it by
        mask[:, None].expand(-1, G, -1).gather(2, indices).

    Raises:
        ValueError: unknown policy, or a budget below 1.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy} is unknown; choose one of {', '.join(POLICIES)}")
    if budget < 1:
        raise ValueError(f"budget={budget} candidates must be at least 1")
    if policy == "rkv":
        score = joint_score(importance, redundancy(keys, mask), lambda_)
    else:
        score = _blind_score(mask, keys.shape[2], budget, policy, seed)
    return best(score.mean(1, keepdim=True) if shared else score, mask, budget)


def joint_score(importance: Tensor, redundancy: Tensor, lambda_: float) -> Tensor:
    """lambda I - (1 - lambda) R, the score by which the paper evicts."""
    return lambda_ * importance - (1 - lambda_) * redundancy


def _blind_score(mask: Tensor, heads: int, budget: int, policy: str, seed: int) -> Tensor:
    """Scores (B, G, S) of the policies that ignore content, by a candidate's rank in its row."""
    rank = (mask.long().cumsum(1) - 1).clamp(min=0)
    if policy == "uniform":  # of n candidates those at which floor(budget rank / n) rises, in integers
        count = mask.sum(1, keepdim=True).clamp(min=1)
        rises = (rank + 1) * budget // count > rank * budget // count
        return rises.float()[:, None].expand(-1, heads, -1)
    # Drawn candidate by candidate, so that longer rows continue the draws of shorter ones.
    draws = torch.rand(mask.shape[1], heads, generator=torch.Generator().manual_seed(seed))
    return draws.to(mask.device)[rank].transpose(1, 2)


def best(score: Tensor, mask: Tensor, budget: int) -> Tensor:
    """Indices (B, G, n) of the highest scores (B, G, S), see select; ties go to the earlier."""
    S = score.shape[2]
    order = score.masked_fill(~mask[:, None], float("-inf")).sort(dim=-1, descending=True, stable=True)
    kept = order.indices[..., : min(budget, S)]
    padding = ~mask[:, None].expand_as(score).gather(2, kept)
    return (kept + S * padding).sort(dim=-1).values % S


def cached_keys(model: LanguageModel, layer: int, held: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's attention reads from its cache.

    Args:
        layer: its number.
        held: (B, S, W), a slot of a LatentCache.

    Returns:
        Rotated keys (B, S, G, K) and values (B, S, G, V); for latent attention, of all H heads, reconstructed
        from the latents.
    """
    keys, values = model.attention_layer(layer).keys_and_values(held)
    return keys, values


def expanded_keys(model: LanguageModel, layer: int, held: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cached_keys with any rotation by positions (B or 1, S) undone: keys before RoPE, and values."""
    keys, values = cached_keys(model, layer, held)
    if model.config.learned_positions:
        return keys, values
    width = model.config.rotary_dim
    inverse = torch.view_as_complex(rotations(positions, model.config)).reciprocal()
    turned_back = rotate(keys[..., -width:], torch.view_as_real(inverse))
    return torch.cat((keys[..., :-width], turned_back), -1), values


class CacheCompressor:
    """Limits a cache to the prompt and at most budget + buffer generated tokens.

    When it holds that many, they are cut to `budget`, including the last `window`. Each slot (layer, loop
    step) chooses for itself; in plain attention, so does each key-value head. Latent attention makes one
    choice per slot, because its heads share the latents. For a slot that several loop steps read, the queries
    of all these steps count.

    Tokens keep the positions they were read at, so the cache's length no longer gives the next position.
    The embeddings' convolution keeps its last tokens, because it reads no others.

    Args:
        model: the model that reads.
        prompt: (B, T), 1 where a token of the prompt is real.
        cache: of the prompt, read or not; from the next pass on it collects queries.
        limit: how many tokens to keep, and by what score.
        halting: with which the model reads; default: the config's.

    Raises:
        ValueError: a number of the limit is out of range, or a model that caches more than keys and values.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Tensor,
        cache: LatentCache,
        limit: CacheLimit,
        halting: HaltingConfig | None = None,
    ) -> None:
        check_limit(model.config, limit, halting)
        self.model, self.cache, self.limit = model, cache, limit
        self.prompt_length = prompt.shape[1]
        self.position = prompt.long().sum(1, keepdim=True) - 1  # (B, 1), of the last token read
        self.window: deque[dict[Slot, list[Tensor]]] = deque(maxlen=limit.window)

    def next_position(self) -> Tensor:
        """(B, 1) position of the next generated token."""
        self.position = self.position + 1
        return self.position

    def after_pass(self, attention_mask: Tensor | None) -> Tensor | None:
        """Call this after every pass; it cuts the cache when it is full.

        Args:
            attention_mask: (B, S), for the cached tokens.

        Returns:
            The mask for the tokens that are cached now.
        """
        if self.cache.queries is not None:  # those of the prompt do not count
            self.window.append(self.cache.queries)
        self.cache.queries = {}
        generated = self.cache.length - self.prompt_length
        if generated < self.limit.budget + self.limit.buffer:
            return attention_mask
        if attention_mask is None:
            rows = self.position.shape[0]
            real = torch.ones(rows, generated, dtype=torch.bool, device=self.position.device)
        else:
            real = attention_mask[:, self.prompt_length :].bool()
        self.cache.keep(self.prompt_length, lambda slot, held: self._kept_entries(slot, held, real))
        if attention_mask is None:
            return None
        # Every slot and head puts its real tokens first, and keeps all of them if they are few.
        kept = torch.arange(self.limit.budget, device=real.device) < real.sum(1, keepdim=True)
        return torch.cat((attention_mask[:, : self.prompt_length], kept.to(attention_mask.dtype)), 1)

    def select(self, rows: Tensor, cache: LatentCache) -> None:
        """Goes on with `rows` (n,) int64, which `cache` holds, maybe with less padding before the prompt."""
        self.prompt_length -= self.cache.length - cache.length
        self.cache, self.position = cache, self.position[rows]
        cache.queries = {}
        for queries in self.window:
            for slot, asked in queries.items():
                queries[slot] = [query[rows] for query in asked]

    def _kept_entries(self, slot: Slot, held: Tensor, real: Tensor) -> Tensor:
        """Which of a slot's generated tokens held (B, S, W) to keep: (B, parts of W, budget)."""
        budget, recent = self.limit.budget, self.limit.window
        if slot[0] == "embedding":
            last = torch.arange(held.shape[1] - budget, held.shape[1], device=held.device)
            return last.expand(len(held), 1, -1)
        keys, _ = cached_keys(self.model, int(slot[0]), held)
        score = joint_score(
            F.pad(self._importance(slot, keys[:, :-recent], real[:, :-recent]), (0, recent)),
            redundancy(keys, real),
            self.limit.lambda_,
        )
        if self.model.config.use_mla:
            score = score.mean(1, keepdim=True)
        score[..., -recent:] = float("inf")
        kept = best(score, real, budget)
        return kept if self.model.config.use_mla else kept.repeat(1, 2, 1)  # of keys, and of values

    def _importance(self, slot: Slot, candidates: Tensor, real: Tensor) -> Tensor:
        """(B, G, S) of candidates (B, S, G, K), by the last tokens' queries."""
        asked = [query for queries in self.window for query in queries.get(slot, [])]
        if not asked:  # a loop step that none of the last tokens reached
            return candidates.new_zeros(len(candidates), candidates.shape[2], candidates.shape[1])
        attention = self.model.attention_layer(int(slot[0]))
        query = torch.cat(asked, 1)
        # A row whose last tokens are padding has ended; what it keeps is never read.
        every = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
        return importance(query, candidates, real, every, attention.scale)


def check_limit(config: ModelConfig, limit: CacheLimit, halting: HaltingConfig | None = None) -> None:
    """Raises ValueError for a number out of range, or a model that caches more than keys and values."""
    budget, buffer, lambda_, window = limit
    if not 0 <= lambda_ <= 1:
        raise ValueError(
            f"kv_lambda={lambda_} must lie in 0 <= kv_lambda <= 1, the share of importance in the score"
        )
    if window < 1:
        raise ValueError(
            f"kv_window={window} must be at least 1: the queries of so many last tokens judge the others"
        )
    if budget <= window or buffer < 1:
        raise ValueError(
            f"kv_budget={budget} and kv_buffer={buffer}: the budget must be at least {window + 1}, since the "
            f"last kv_window={window} tokens always stay, and the buffer at least 1"
        )
    halting = halting or config.recurrence.halting
    averages = config.recurrence.placement != "none" and halting.kind != "fixed"
    for refused, name in (
        (config.num_memory_tokens, f"num_memory_tokens={config.num_memory_tokens}"),
        (config.num_pause_tokens, f"num_pause_tokens={config.num_pause_tokens}"),
        (config.embedding_mixing > budget, f"embedding_mixing={config.embedding_mixing}"),
        (
            config.recurrence.position_mixing,
            f"recurrence.position_mixing={config.recurrence.position_mixing}",
        ),
        (averages and halting.granularity != "token", f"halting.granularity={halting.granularity}"),
    ):
        if refused:
            raise ValueError(
                f"kv_budget={budget} drops keys and values of single tokens, but a model with {name} needs "
                "more of every token it has read; leave kv_budget out"
            )

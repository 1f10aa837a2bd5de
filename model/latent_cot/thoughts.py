"""Latent chain of thought: a question is read once, and latents iterate over its cache.

    [bos] Q <bot>  z_1 ... z_c  <eot> A

    jacobi      z^0 = E; z^t_1 = prj(h_bot), z^t_i = prj(h^(t-1)_(i-1)), t = 1..T (PCCoT, arXiv 2506.18582)
    sequential  z_1 = prj(h_bot), z_i = prj(h_(i-1)) (Coconut, arXiv 2412.06769; CODI, arXiv 2502.21074)
    none        z = E (pause tokens, arXiv 2310.02226)
    lotus       z^1 = E; z^t = E + h^(t-1), t = 2..R (LOTUS, arXiv 2606.31779)

h are the final normed hidden states of a pass over all latents with the question's cache. After t iterations
jacobi's first t latents equal those of `sequential`, so T >= c equals it.

Shapes: B batch, T question tokens, c latents, D hidden.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LatentCache
from model.config.latent_cot import check_iterations
from model.config.recurrence import HaltingConfig
from model.transformer import ZeroModel


class Thoughts(NamedTuple):
    """The result of thinking, ready for <eot> and the answer."""

    cache: LatentCache  # of the question and the last iteration's latents, T + c positions
    attention_mask: Tensor | None  # (B, T + c); None: nothing is padded
    hidden: Tensor  # (B, c, D) of the last iteration, normed
    iterations: int  # of the slowest row, counted as num_iterations; 0 for kinds without any
    passes: int  # forward passes over latents
    change: Tensor  # (iterations,) of the latents: |new - old| / |old|, the largest over the rows


class _Iteration(NamedTuple):
    """One pass over the latents."""

    latents: Tensor  # (B, c, D), fed in
    hidden: Tensor  # (B, c, D), the output
    cache: LatentCache


class _Thinker:
    """A question that has been read, and how to run latents after it."""

    def __init__(
        self, model: ZeroModel, cache: LatentCache, attention_mask: Tensor | None, **loop: Any
    ) -> None:
        self.model, self.cache, self.mask, self.loop = model, cache, attention_mask, loop
        self.passes = 0

    def run(self, latents: Tensor, cache: LatentCache) -> _Iteration:
        """Runs latents (B, n, D) after what a cache holds; the cache is unchanged."""
        cache = cache.branch()
        mask = None if self.mask is None else self.mask[:, : cache.length + latents.shape[1]]
        out, _ = self.model.read(attention_mask=mask, cache=cache, inputs_embeds=latents, **self.loop)
        self.passes += 1
        return _Iteration(latents, out.hidden, cache)


def think(
    model: ZeroModel,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    num_latents: int | None = None,
    num_iterations: int | None = None,
    num_steps: int | None = None,
    tolerance: float = 0.0,
    replace: str | None = None,
    seed: int = 0,
    differentiable: bool | None = None,
    halting: HaltingConfig | None = None,
) -> Thoughts:
    """Reads questions and thinks about them; gradients flow through all iterations.

    Args:
        tokens: (B, T) int64, [bos] Q <bot>, shorter rows padded on the LEFT.
        attention_mask: (B, T), 1 where a token is real; default: all.
        num_latents: c; default: the config's.
        num_iterations: T of jacobi, R of lotus; default: the config's.
        num_steps: loop steps of the model; default: the config's.
        tolerance: at inference, a row stops once an iteration would change its latents by less than this
            share of their norm. Each row stops by itself, so no row depends on its neighbours.
        replace: a control: after the last iteration, each row's latents are replaced and run once more.
            shuffled: by another row's | zeroed: by 0.
        seed: for the permutation of `shuffled`.
        differentiable: whether the cache grows by copies only, which gradients need; default: whether they
            are enabled.
        halting: of the model, in place of the config's; see ZeroModel.forward.

    Raises:
        ValueError: the model has no latent thoughts, an option does not go with its kind, or the row would
            exceed max_position_embeddings.
    """
    steps = model.config.recurrence.num_steps if num_steps is None else num_steps
    c = _checked(model, num_latents, num_iterations, steps, tolerance)
    if replace == "shuffled" and len(tokens) < 2:
        raise ValueError(
            "replace=shuffled takes another row's latents, but the batch has 1 row; give 2 or more"
        )
    if replace not in (None, "shuffled", "zeroed"):
        raise ValueError(f"replace={replace!r} is unknown; choose one of shuffled, zeroed, or None")
    cache = LatentCache(differentiable=torch.is_grad_enabled() if differentiable is None else differentiable)
    loop: dict[str, Any] = {"num_steps": num_steps, "halting": halting}
    question, _ = model.read(tokens, attention_mask, cache=cache, **loop)
    mask = None if attention_mask is None else F.pad(attention_mask, (0, c), value=1)
    thinker, settings = _Thinker(model, cache, mask, **loop), model.config.latent_cot
    bot = question.hidden[:, -1:]
    change = bot.new_zeros(0)
    if settings.feedback == "sequential":
        last = _one_after_another(thinker, bot, c)
    else:
        iterations = settings.iterations if num_iterations is None else num_iterations
        last, change = _all_at_once(thinker, bot, c, iterations, tolerance)
    if replace is not None:
        last = thinker.run(_replaced(last.latents, replace, seed), cache)
    counted = len(change) + (settings.feedback == "lotus")
    return Thoughts(last.cache, mask, last.hidden, counted, thinker.passes, change)


def _checked(
    model: ZeroModel, num_latents: int | None, num_iterations: int | None, steps: int, tolerance: float
) -> int:
    """The number of latents."""
    settings = model.config.latent_cot
    if not settings.num_latents:
        raise ValueError(
            "this model has no latent thoughts (model.latent_cot.num_latents=0); train one that has"
        )
    if num_latents is not None and num_latents < 1:
        raise ValueError(f"num_latents={num_latents} must be at least 1")
    check_iterations(settings, num_iterations)
    if not model.config.decodes_exactly(steps):
        raise ValueError(
            f"num_steps={steps} exceeds model.recurrence.virtual_layers="
            f"{model.config.recurrence.virtual_layers}: the question's cache would not be exact; lower it"
        )
    if tolerance < 0 or (tolerance and torch.is_grad_enabled()):
        raise ValueError(
            f"tolerance={tolerance} must not be negative, and must be 0 with gradients, where all "
            "ranks iterate equally often"
        )
    if tolerance and not settings.iterations:
        raise ValueError(
            f"tolerance={tolerance} stops iterations, but feedback={settings.feedback} has none; leave it out"
        )
    return settings.num_latents if num_latents is None else num_latents


def _one_after_another(thinker: _Thinker, bot: Tensor, c: int) -> _Iteration:
    """Sequential feedback from the state at <bot> (B, 1, D)."""
    hidden, cache, runs = bot, thinker.cache, list[_Iteration]()
    for _ in range(c):
        runs.append(thinker.run(thinker.model.latent_thoughts.project(hidden), cache))
        hidden, cache = runs[-1].hidden, runs[-1].cache
    return _Iteration(torch.cat([r.latents for r in runs], 1), torch.cat([r.hidden for r in runs], 1), cache)


def _all_at_once(
    thinker: _Thinker, bot: Tensor, c: int, iterations: int, tolerance: float
) -> tuple[_Iteration, Tensor]:
    """Parallel feedback; also the latents' change in each iteration after the first pass."""
    unit, settings = thinker.model.latent_thoughts, thinker.model.config.latent_cot
    ids = torch.zeros(len(bot), c, dtype=torch.int64, device=bot.device)
    first = unit.project(bot)
    last, changes = thinker.run(unit.initial(ids), thinker.cache), list[Tensor]()
    running = torch.ones(len(bot), dtype=torch.bool, device=bot.device)
    for _ in range(iterations - (settings.feedback == "lotus")):
        latents = unit.feed_back(first, ids, last.hidden)
        change = _relative_change(last.latents, latents)
        if tolerance:
            running = running & (change >= tolerance)
            if not bool(running.any()):
                break
            latents = torch.where(running[:, None, None], latents, last.latents)
        changes.append(change.masked_fill(~running, 0.0).amax())
        last = thinker.run(latents, thinker.cache)
    return last, torch.stack(changes) if changes else bot.new_zeros(0)


@torch.no_grad()
def _relative_change(old: Tensor, new: Tensor) -> Tensor:
    """old and new (B, c, D) -> (B,) fp32."""
    before = old.float().flatten(1)
    return (new.float().flatten(1) - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)


def _replaced(latents: Tensor, replace: str, seed: int) -> Tensor:
    """The control's latents (B, c, D)."""
    if replace == "zeroed":
        return torch.zeros_like(latents)
    return latents[derangement(len(latents), seed).to(latents.device)]


def derangement(n: int, seed: int) -> Tensor:
    """(n,) int64, a random cycle through 0..n-1: for n >= 2 no number keeps its index."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return source


@torch.no_grad()
def generate_with_thoughts(
    model: ZeroModel,
    tokens: Tensor,
    eot_id: int,
    max_new_tokens: int = 64,
    attention_mask: Tensor | None = None,
    thinking: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Thoughts]:
    """Thinks about questions and answers them.

    Args:
        tokens: (B, T) int64, [bos] Q <bot>, shorter rows padded on the LEFT.
        eot_id: the token <eot>, fed after the thoughts.
        max_new_tokens: of the answer, n.
        attention_mask: (B, T), 1 where a token is real; default: all.
        thinking: further arguments of `think`.
        options: for generate.generate.

    Returns:
        (B, n) answers, and the thoughts, whose cache also holds the answer except its last token.

    Raises:
        ValueError: as `think` and `generate` do.
    """
    loop: dict[str, Any] = {name: options.get(name) for name in ("num_steps", "halting")}
    thoughts = think(model, tokens, attention_mask, **loop, **(thinking or {}))
    eot = tokens.new_full((len(tokens), 1), eot_id)
    mask = None if thoughts.attention_mask is None else F.pad(thoughts.attention_mask, (0, 1), value=1)
    answer = model.generate(eot, max_new_tokens, attention_mask=mask, cache=thoughts.cache, **options)
    return answer[:, 1:], thoughts

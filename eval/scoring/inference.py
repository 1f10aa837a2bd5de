"""What one batch computes: log-probabilities and answers in token ids, over a cache of shared tokens.

Every request is [prefix | context | its own tokens]. The prefix, common to a whole task, is read once and
kept from batch to batch; a context, common to some rows, is read once per batch. Cached rows are moved to the
right end, so that a row's tokens are contiguous, whatever the lengths of its neighbours.

Shapes: B rows, T tokens of the longest row, S cached tokens, N predicted tokens, V vocabulary, D hidden.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from data_pipeline.tokenization.tokenizer import PAD_ID, Tokenizer
from model import ZeroModel
from model.cache import LatentCache
from model.interface import ModelOutput
from model.latent_cot.rkv import CacheCompressor, CacheLimit

ADAPTIVE = "adaptive"
Depth = int | str | None  # loop steps, ADAPTIVE, or None: as the model is configured
# Finished rows leave the batch once they are this share of it: copying the others costs about one step.
LEAVING_SHARE = 0.25
OVERFLOW = "its weights are not finite, or its activations overflow; it cannot be evaluated"


class Job(Protocol):
    """A batch that an Engine computes: a NamedTuple of values that JSON can hold, so that they are its key in
    the journal, and that another process can be sent.
    """

    def run(self, engine: "Engine") -> list[tuple[Any, float | None]]:
        """Per answer its value, of JSON's types, and its loop steps (None: none to report)."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class ScoreRow(NamedTuple):
    """One continuation."""

    context: int  # number of the context it follows
    tokens: list[int]  # read after it; the last len(target) of them predict the target
    target: list[int]


class ScoreJob(NamedTuple):
    """A batch of log-likelihoods; the value of each row is [sum of log-probabilities, whether greedy]."""

    prefix: list[int]
    contexts: list[list[int]]  # each read once; all empty: the rows share nothing but the prefix
    rows: list[ScoreRow]
    rows_at_once: int
    depth: Depth

    def run(self, engine: "Engine") -> list[tuple[Any, float | None]]:
        return engine.score(self)


class GenerateJob(NamedTuple):
    """A batch of prompts; the value of each is [its new token ids, the most bytes its cache held]."""

    prefix: list[int]
    prompts: list[list[int]]  # what follows the prefix, at least one token
    numbers: list[int]  # of the prompts in the whole call: with the seed they decide what is drawn
    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float
    seed: int
    limit: CacheLimit | None  # of the cache, by R-KV; None: all is kept
    depth: Depth

    def run(self, engine: "Engine") -> list[tuple[Any, float | None]]:
        return engine.generate(self)


class Answer(NamedTuple):
    """What is known of one request, or of a whole job that has one answer."""

    value: Any
    steps: (
        float | None
    )  # loop steps where its tokens are predicted, mean over positions and loops; None: no loop
    seconds: float  # its share of its batch's time


class Held(NamedTuple):
    """A cache whose rows end at its right end."""

    cache: LatentCache
    padding: list[int]  # tokens before each row's first one


class Read(NamedTuple):
    """Contexts that were read in one pass, padded as they came; counts are of tokens."""

    cache: LatentCache
    ends: list[int]  # position after each row's last token
    lengths: list[int]  # of each row, the prefix included
    logits: Tensor | None  # (B, V) after each row's last token; None: only the prefix was read
    steps: Tensor | None  # (B,) loop steps there


class Engine:
    """A model, its tokenizer, and the prefix it read last. `run` computes a batch."""

    def __init__(self, model: ZeroModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = next(model.parameters()).device
        self.positions_per_token = model.config.positions_per_token
        self._variants: dict[str, ZeroModel] = {}  # by kind of halting
        self._prefix: tuple[tuple[list[int], Depth], LatentCache] | None = None

    @torch.inference_mode()
    def run(self, job: Job) -> list[Answer]:
        """The job's answers. Raises ValueError if the model's outputs are not finite, or memory runs out."""
        start = self._now()
        try:
            found = job.run(self)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise ValueError(f"the memory of {self.device} ran out: lower --batch_size") from error
            raise
        seconds = (self._now() - start) / len(found)
        return [Answer(value, steps, seconds) for value, steps in found]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ---- log-likelihoods

    def score(self, job: ScoreJob) -> list[tuple[Any, float | None]]:
        """See ScoreJob."""
        read = None
        if job.prefix or any(job.contexts):
            read = self._read(job.prefix, job.contexts, job.depth)
        found: list[tuple[Any, float | None]] = []
        for start in range(0, len(job.rows), job.rows_at_once):
            rows = job.rows[start : start + job.rows_at_once]
            room = max(len(row.tokens) for row in rows)
            held = read and self._aligned(read, [row.context for row in rows], room)
            found += self._score_rows(rows, held, job.depth)
        return found

    def _score_rows(
        self, rows: Sequence[ScoreRow], held: Held | None, depth: Depth
    ) -> list[tuple[list[Any], float | None]]:
        """Each row's target, by the hidden states that predict it alone: the head is spared the others."""
        tokens, _ = pad([row.tokens for row in rows], self.device)
        out = self._forward(tokens, held, depth)
        counts = [len(row.target) for row in rows]
        lines = [line for line, count in enumerate(counts) for _ in range(count)]
        columns = [c for row in rows for c in range(len(row.tokens) - len(row.target), len(row.tokens))]
        targets = torch.tensor([token for row in rows for token in row.target], device=self.device)  # (N,)
        assert out.hidden is not None
        log_probs = self.model.lm_head(out.hidden[lines, columns]).float().log_softmax(-1)  # (N, V)
        picked = log_probs.gather(-1, targets[:, None])[:, 0].cpu().split(counts)
        likeliest = (log_probs.argmax(-1) == targets).cpu().split(counts)
        steps = self._steps(out, lines, columns)
        means = [None] * len(rows) if steps is None else [s.mean().item() for s in steps.split(counts)]
        return [
            (score_value(values, same), mean)
            for values, same, mean in zip(picked, likeliest, means, strict=True)
        ]

    # ---- generation

    def generate(self, job: GenerateJob) -> list[tuple[Any, float | None]]:
        """See GenerateJob."""
        draws = self._draws(job)
        new: list[list[int]] = [[] for _ in job.prompts]
        walked: list[list[float]] = [[] for _ in job.prompts]
        running, ended = list(range(len(new))), set[int]()  # rows in the batch; rows that have their answer
        unique = list(dict.fromkeys(map(tuple, job.prompts)))  # samples of one prompt share its reading
        sources = [unique.index(tuple(prompt)) for prompt in job.prompts]
        read = self._read(job.prefix, [list(prompt) for prompt in unique], job.depth)
        room = job.max_new_tokens if job.limit is None else job.limit.budget + job.limit.buffer
        held = self._aligned(read, sources, min(room, job.max_new_tokens))
        compressor = None if job.limit is None else self._compressor(held, job.limit, job.depth)
        most = _row_bytes(held)
        assert read.logits is not None
        logits, steps = read.logits[sources], None if read.steps is None else read.steps[sources]
        for n in range(job.max_new_tokens):
            chosen = choose(logits, job.temperature, None if draws is None else draws[running, n])  # (B,)
            taken = [0.0] * len(running) if steps is None else steps.tolist()
            for row, token, count in zip(running, chosen.tolist(), taken, strict=True):
                if row not in ended:
                    new[row].append(token)
                    walked[row].append(count)
                    if self._ends(new[row], job.stop):
                        ended.add(row)
            alive = [line for line, row in enumerate(running) if row not in ended]
            if not alive or n == job.max_new_tokens - 1:
                break
            if len(alive) <= (1 - LEAVING_SHARE) * len(running):
                held = self._selected(held, alive, min(room, job.max_new_tokens - n))
                chosen, running = chosen[alive], [running[line] for line in alive]
                if compressor is not None:
                    compressor.select(torch.tensor(alive, device=self.device), held.cache)
            positions = None if compressor is None else compressor.next_position()
            output = self._forward(chosen[:, None], held, job.depth, positions)
            for row, size in zip(running, _row_bytes(held), strict=True):
                most[row] = most[row] if row in ended else max(most[row], size)
            if compressor is not None:
                compressor.after_pass(None)  # what a row reads after its end counts as real
            assert output.logits is not None
            logits, lines = output.logits[:, -1], list(range(len(running)))
            steps = self._steps(output, lines, [0] * len(lines))
        means = [None if steps is None else sum(row) / len(row) for row in walked]
        return [([ids, size], mean) for ids, size, mean in zip(new, most, means, strict=True)]

    def _compressor(self, held: Held, limit: CacheLimit, depth: Depth) -> CacheCompressor:
        """Of a cache that holds the prompts, and collects queries from now on."""
        padding = torch.tensor(held.padding, device=self.device)
        real = torch.arange(held.cache.length, device=self.device) >= padding[:, None]
        compressor = CacheCompressor(self._variant(depth)[0], real, held.cache, limit)
        compressor.after_pass(None)
        return compressor

    def _ends(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        if ids[-1] == self.tokenizer.eos_id:
            return True
        # A stop string that ends in the newest token spans at most as many tokens as it has bytes.
        tail = max((len(text.encode()) for text in stop), default=0)
        text = self.tokenizer.decode(ids[-tail:]) if tail else ""
        return any(s in text for s in stop)

    def _draws(self, job: GenerateJob) -> Tensor | None:
        """(B, max_new_tokens) uniform numbers, a function of the seed and each row's number alone."""
        if job.temperature == 0:
            return None
        draws = []
        for number in job.numbers:
            digest = hashlib.sha256(f"{job.seed},{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            draws.append(torch.rand(job.max_new_tokens, generator=generator, dtype=torch.float64))
        return torch.stack(draws).to(self.device)

    # ---- passes over the cache

    def _forward(
        self, tokens: Tensor, held: Held | None, depth: Depth, position_ids: Tensor | None = None
    ) -> ModelOutput:
        """A pass over tokens (B, T), padded on the right if at all: no token sees what follows it."""
        model, num_steps = self._variant(depth)
        if held is None:
            return model(tokens, num_steps=num_steps, logits_to_keep=1)
        mask = None
        if any(held.padding):
            width = held.cache.length // self.positions_per_token + tokens.shape[1]
            padding = torch.tensor(held.padding, device=self.device)
            mask = torch.arange(width, device=self.device) >= padding[:, None]
        return model(
            tokens,
            attention_mask=mask,
            position_ids=position_ids,
            num_steps=num_steps,
            cache=held.cache,
            logits_to_keep=1,
        )

    def _read(self, prefix: list[int], rows: list[list[int]], depth: Depth) -> Read:
        """Reads what follows the prefix; if nothing does, the cache has one row, the prefix."""
        shared = self._prefix_cache(prefix, depth) if prefix else None
        if not any(rows):
            assert shared is not None
            return Read(shared, [len(prefix)] * len(rows), [len(prefix)] * len(rows), None, None)
        lengths = [len(prefix) + len(row) for row in rows]
        lines, width = list(range(len(rows))), max(map(len, rows))
        if self.model.config.num_memory_tokens:  # a state is what remains of a row: it must end where it ends
            tokens, _ = pad(rows, self.device, left=True)
            held, ends = (
                Held(LatentCache(limited=False), [width - len(row) for row in rows]),
                [width] * len(rows),
            )
        else:
            tokens, _ = pad(rows, self.device)
            held, ends = Held(LatentCache(limited=False), [0] * len(rows)), lengths
            if shared is not None:
                one = Read(shared, [len(prefix)], [len(prefix)], None, None)
                held = self._aligned(one, [0] * len(rows), room=width)
        out = self._forward(tokens, held, depth)
        last = [end - len(prefix) - 1 for end in ends]
        assert out.hidden is not None
        return Read(
            held.cache,
            ends,
            lengths,
            self.model.lm_head(out.hidden[lines, last]),
            self._steps(out, lines, last),
        )

    def _prefix_cache(self, prefix: list[int], depth: Depth) -> LatentCache:
        if self._prefix is None or self._prefix[0] != (prefix, depth):
            self._prefix, cache = None, LatentCache(limited=False)
            self._forward(torch.tensor([prefix], device=self.device), Held(cache, [0]), depth)
            self._prefix = ((prefix, depth), cache)
        return self._prefix[1]

    def _aligned(self, read: Read, sources: Sequence[int], room: int) -> Held:
        """The rows `sources` of what was read, with room for so many tokens."""
        return self._gathered(
            read.cache, sources, [read.ends[i] for i in sources], [read.lengths[i] for i in sources], room
        )

    def _selected(self, held: Held, lines: Sequence[int], room: int) -> Held:
        """The rows that stay, without padding that no row needs."""
        width = held.cache.length // self.positions_per_token
        lengths = [width - held.padding[line] for line in lines]
        return self._gathered(held.cache, lines, [width] * len(lines), lengths, room)

    def _gathered(
        self, cache: LatentCache, rows: Sequence[int], ends: Sequence[int], lengths: Sequence[int], room: int
    ) -> Held:
        parts = torch.tensor([rows, ends, lengths], device=self.device)
        parts[1:] *= self.positions_per_token
        sources, stops, widths = parts
        longest = max(lengths)
        moved = cache.gathered(sources, stops, widths, room * self.positions_per_token)
        return Held(moved, [longest - length for length in lengths])

    def _steps(self, out: ModelOutput, lines: list[int], columns: list[int]) -> Tensor | None:
        """(N,) loop steps of the tokens at these rows and columns, on the CPU; the last pause predicts."""
        if out.num_iterations is None:
            return None
        positions = [(column + 1) * self.positions_per_token - 1 for column in columns]
        return out.num_iterations.float().mean(0)[lines, positions].cpu()

    # ---- depth

    def _variant(self, depth: Depth) -> tuple[ZeroModel, int | None]:
        """The model that runs a depth, and its number of steps (None: the configured)."""
        r = self.model.config.recurrence
        if depth == ADAPTIVE and r.halting.kind == "fixed":
            measure = "kl" if r.placement == "block" else "cosine"
            # Every token fills as many steps as keep keys of their own.
            limits = {"measure": measure, "min_steps": r.virtual_layers or 1}
            return self._halting("threshold", **limits), None
        if isinstance(depth, int):
            training_free = r.halting.kind == "threshold"
            return (self._halting("fixed") if training_free else self.model), depth
        return self.model, None

    def _halting(self, kind: str, **options: Any) -> ZeroModel:
        """The model with another kind of halting, made once; of one model each kind has the same options."""
        if kind not in self._variants:
            self._variants[kind] = with_halting(self.model, kind=kind, **options)
        return self._variants[kind]


def _row_bytes(held: Held) -> list[int]:
    """What the cache holds of each row, its padding not counted."""
    cache, rows = held.cache, len(held.padding)
    token = cache.nbytes() // (rows * max(1, cache.length))
    return [(cache.length - padding) * token for padding in held.padding]


def pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as one tensor (B, T) int64, with the mask (B, T) of its real tokens."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), PAD_ID, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[b, columns] = torch.tensor(row, dtype=torch.int64)
        mask[b, columns] = True
    return tokens.to(device), mask.to(device)


def score_value(log_probs: Tensor, likeliest: Tensor) -> list[Any]:
    """The value of a ScoreJob's row, from its target's tokens: log_probs (n,), and whether each (n,) is the
    likeliest. Raises ValueError if the sum is not finite.
    """
    total = log_probs.sum().item()
    if not math.isfinite(total):
        raise ValueError(f"the model gives a log-probability of {total}: {OVERFLOW}")
    return [total, bool(likeliest.all())]


def with_halting(model: ZeroModel, **changes: Any) -> ZeroModel:
    """The model with other keys of `recurrence.halting` and the same weights (shared), without those
    that only the model's kind of halting needs. The new kind must not need weights of its own.
    """
    recurrence = model.config.recurrence
    halting = dataclasses.replace(recurrence.halting, **changes)
    recurrence = dataclasses.replace(recurrence, halting=halting)
    with torch.device("meta"):
        variant = ZeroModel(
            dataclasses.replace(model.config, recurrence=recurrence), execution=model.execution
        )
    missing, _ = variant.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing, missing
    return variant.eval()


def require_finite(logits: Tensor) -> None:
    """Raises ValueError if one of the logits (..., V) is NaN or +inf, or all of one distribution are -inf."""
    highest = logits.amax(-1)  # NaN where one is
    if not highest.isfinite().all():
        wrong = highest[~highest.isfinite()][0].item()
        raise ValueError(f"the model gives a logit of {wrong}: {OVERFLOW}")


@contextmanager
def finite_logits(model: ZeroModel) -> Iterator[None]:
    """A block in which every pass of the model is checked by `require_finite`."""
    hook = model.register_forward_hook(
        lambda _module, _inputs, output: None if output.logits is None else require_finite(output.logits)
    )
    try:
        yield
    finally:
        hook.remove()


def choose(logits: Tensor, temperature: float, draws: Tensor | None) -> Tensor:
    """logits (B, V) -> tokens (B,): the likeliest, or where draws (B,) fall in the distribution's sums.

    Raises ValueError if one of the logits is NaN or infinite.
    """
    require_finite(logits)
    if draws is None:
        return logits.argmax(-1)
    sums = (logits.double() / temperature).softmax(-1).cumsum(-1)
    found = torch.searchsorted(sums, (draws * sums[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)

"""Answers with an explicit chain of thought, with latent thoughts or with neither, and what each costs.

    cot       [bos] Q <bot>          the model writes C <eot> A [eos]
    thoughts  [bos] Q <bot> z <eot>  it thinks in latents and writes A [eos]
    none      [bos] Q <bot> <eot>    it writes A [eos] at once

Shapes: B questions of a batch, T tokens of the longest, n generated tokens.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from data_pipeline.sources.documents import ANSWER_PREFIX
from data_pipeline.tokenization.encode import encode_question, encode_traced
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.scoring.core import Scorer
from eval.scoring.inference import Engine, finite_logits, pad
from eval.thinking.tasks import QuestionSet
from model import ZeroModel
from model.cache import LatentCache
from model.generate import without_padding
from model.latent_cot.rkv import BUFFER, IMPORTANCE_SHARE, OBSERVATION_WINDOW
from model.latent_cot.thoughts import generate_with_thoughts

MODES = ("cot", "thoughts", "none")
COT_TOKENS = 256  # of a chain of thought with its answer, where no reference says how long it is
SPARE_TOKENS = 8  # beyond the longest reference
TIMED = 10  # questions of each depth that are also answered alone


class Way(NamedTuple):
    """How to answer; what belongs to another mode is None."""

    mode: str
    num_latents: int | None = None
    num_iterations: int | None = None
    tolerance: float = 0.0
    replace: str | None = None
    kv_budget: int | None = None
    kv_buffer: int = BUFFER
    kv_lambda: float = IMPORTANCE_SHARE
    kv_window: int = OBSERVATION_WINDOW
    temperature: float = 0.0  # of answers that vote, see votes.py; 0: the most likely token


class Answered(NamedTuple):
    """What one question got. A batch changes none of it but the seconds; see also `answer_batch`."""

    tokens: list[int]  # generated, eos included
    passes: (
        int  # forward passes: of the question, of latents, of <eot>, and of all generated tokens but the last
    )
    cache_bytes: int  # at the end of the answer
    peak_cache_bytes: int  # at most while answering
    seconds: float  # its share of its batch's


class Answers(NamedTuple):
    """All questions answered in one way."""

    mode: str
    rows: list[Answered]
    alone: dict[int, float]  # seconds of questions in a batch of one; {}: not measured
    num_truncated: int  # questions cut from the left
    max_new_tokens: int


class ThinkJob(NamedTuple):
    """A batch for `answer_batch`; its value has a row per prompt, the fields of Answered."""

    prompts: list[list[int]]
    way: Way
    max_new_tokens: int
    seed: int
    alone: bool = False  # one question, for its seconds

    def run(self, engine: Engine) -> list[tuple[Any, float | None]]:
        with finite_logits(engine.model):
            rows = answer_batch(
                engine.model, engine.tokenizer, self.prompts, self.way, self.max_new_tokens, self.seed
            )
        return [([list(row) for row in rows], None)]


def answer_all(scorer: Scorer, data: QuestionSet, way: Way, max_new_tokens: int | None, seed: int) -> Answers:
    """Answers in the order of the questions; a question that leaves no room is cut from the left.

    Raises ValueError if none could have room, or the model cannot answer in this way.
    """
    model, tokenizer = scorer.model, scorer.tokenizer
    rows = [encode_question(question.text, tokenizer) for question in data.questions]
    length = max_new_tokens or _longest_answer(tokenizer, data, way.mode)
    if way.mode == "none":
        assert tokenizer.eot_id is not None  # encode_question has seen to it
        rows = [[*row, tokenizer.eot_id] for row in rows]
    room = model.config.max_position_embeddings - length - _num_latent_tokens(model, way)
    if room < 2:
        raise ValueError(
            f"max_new_tokens is {length}: with the thoughts it leaves no room for a question in the model's"
            f" max_position_embeddings {model.config.max_position_embeddings}; lower --max_new_tokens"
        )
    cut = [row[-room:] for row in rows]
    members = batches(scorer, [len(row) for row in cut], way.replace == "shuffled")
    jobs = [ThinkJob([cut[i] for i in batch], way, length, seed) for batch in members]
    found: dict[int, Answered] = {}
    for batch, answered in zip(members, scorer.compute(jobs, way.mode), strict=True):
        found |= {i: Answered(*row) for i, row in zip(batch, answered, strict=True)}
    alone = {}
    if way.replace != "shuffled" and not way.temperature:  # which takes two questions; votes are not timed
        timed = list(_timed(data))
        if scorer.batch_size == 1:
            alone = {i: found[i].seconds for i in timed}
        else:
            singles = [ThinkJob([cut[i]], way, length, seed, alone=True) for i in timed]
            values = scorer.compute(singles, f"{way.mode}, one at a time")
            alone = {i: Answered(*row).seconds for i, (row,) in zip(timed, values, strict=True)}
    truncated = sum(len(row) > room for row in rows)
    return Answers(way.mode, [found[i] for i in range(len(cut))], alone, truncated, length)


def try_way(scorer: Scorer, data: QuestionSet, way: Way, seed: int) -> None:
    """Answers two questions by one token. Raises ValueError if the model cannot answer in this way."""
    room = scorer.model.config.max_position_embeddings - 1 - _num_latent_tokens(scorer.model, way)
    rows = [encode_question(question.text, scorer.tokenizer) for question in data.questions[:2]]
    if room > 1:  # `answer_all` says what else is wrong
        scorer.compute([ThinkJob([row[-room:] for row in rows], way, 1, seed)], "trying")


def _num_latent_tokens(model: ZeroModel, way: Way) -> int:
    """How many latents and <eot> lie between question and answer."""
    if way.mode != "thoughts":
        return 0
    return 1 + (way.num_latents or model.config.latent_cot.num_latents)


def _longest_answer(tokenizer: Tokenizer, data: QuestionSet, mode: str) -> int:
    """The longest reference in tokens, plus SPARE_TOKENS for a model that writes the same in other pieces."""
    longest = 0
    for question in data.questions:
        if mode == "cot" and question.reference is None:
            return COT_TOKENS
        if mode == "cot":
            assert question.reference is not None
            document = encode_traced(question.reference, tokenizer)
            longest = max(longest, len(document.tokens) - document.prompt_length)
        else:
            answer = tokenizer.encode(ANSWER_PREFIX) + tokenizer.encode(f" {question.answer}", eos=True)
            longest = max(longest, len(answer))
    return longest + SPARE_TOKENS


def _timed(data: QuestionSet) -> Iterator[int]:
    """The first TIMED questions of each depth."""
    seen: dict[int | None, int] = {}
    for i, question in enumerate(data.questions):
        seen[question.problem_depth] = count = seen.get(question.problem_depth, 0) + 1
        if count <= TIMED:
            yield i


def batches(scorer: Scorer, lengths: Sequence[int], pairs: bool) -> list[list[int]]:
    """Indices, the longest first; with `pairs` a last batch of one joins the batch before it."""
    found = scorer.by_length(lengths)
    if pairs and len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [found[-2] + found[-1]]
    return found


@torch.inference_mode()
def answer_batch(
    model: ZeroModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    way: Way,
    max_new_tokens: int,
    seed: int,
) -> list[Answered]:
    """Answers to prompts as the mode needs them, see the head of this file.

    Two things depend on the batch: with `replace=shuffled` whose latents a row gets, and with a tolerance the
    passes over latents, which go on until the batch's slowest row has settled.

    Raises ValueError if the model cannot answer in this way.
    """
    device = next(model.parameters()).device
    tokens, padded = pad(prompts, device, left=True)
    mask, start = without_padding(padded), _now(device)
    cache, before, eos = LatentCache(), 0, tokenizer.eos_id
    if way.mode == "thoughts":
        assert tokenizer.eot_id is not None
        new, thoughts = generate_with_thoughts(
            model,
            tokens,
            tokenizer.eot_id,
            max_new_tokens,
            mask,
            {**_thinking(way), "seed": seed},
            eos_token_id=eos,
        )
        cache, before, passes = thoughts.cache, thoughts.hidden.shape[1] + 1, 2 + thoughts.passes
    else:
        whole = model.generate(
            tokens,
            max_new_tokens,
            attention_mask=mask,
            eos_token_id=eos,
            temperature=way.temperature,
            seed=seed,
            cache=cache,
            kv_budget=way.kv_budget,
            kv_buffer=way.kv_buffer,
            kv_lambda=way.kv_lambda,
            kv_window=way.kv_window,
        )
        new, passes = whole[:, tokens.shape[1] :], 1
    seconds = (_now(device) - start) / len(prompts)
    width = next(model.parameters()).element_size()
    token_bytes = width * cache.numel() * model.config.positions_per_token // (len(prompts) * cache.length)
    answered = []
    for prompt, line in zip(prompts, new.tolist(), strict=True):
        own = line[: line.index(eos) + 1] if eos in line else line
        held = len(prompt) + before
        end, peak = _kept(len(own) - 1, way)
        sizes = (held + end) * token_bytes, (held + peak) * token_bytes
        answered.append(Answered(own, passes + len(own) - 1, *sizes, seconds))
    return answered


def _thinking(way: Way) -> dict[str, Any]:
    names = ("num_latents", "num_iterations", "tolerance", "replace")
    return {name: getattr(way, name) for name in names}


def _kept(read: int, way: Way) -> tuple[int, int]:
    """Generated tokens in the cache after reading `read`, and the most so far: see rkv.CacheCompressor."""
    limit = None if way.kv_budget is None else way.kv_budget + way.kv_buffer
    if limit is None or read < limit:
        return read, read
    assert way.kv_budget is not None
    return way.kv_budget + (read - limit) % way.kv_buffer, limit


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

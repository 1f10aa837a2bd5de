"""What the tasks answered by generation share: greedy answers, and the majority vote over sampled ones."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data_pipeline.sources.documents import Problem
from eval.scoring.core import Scorer, mean_score
from eval.scoring.kv_flags import KVFlags, kv_settings, limit_mark
from eval.scoring.results import TaskResult, taken
from eval.scoring.task import Options
from model.latent_cot.rkv import CacheLimit

# The samples that vote are drawn at self-consistency's temperature for language models (Wang et al. 2022,
# arXiv:2203.11171, section 3.1: GPT-3, no top-k). Colder samples are all alike, hotter ones are incoherent.
TEMPERATURE = 0.7
COSTS = ("generated_tokens", "peak_cache_bytes")  # of an answer: the bytes are those of its own cache


class Ballot(NamedTuple):
    """What one sampled response says."""

    answer: str | None  # None: it holds no answer, and does not vote
    right: float  # 1.0 if that is the right answer


def majority_vote(ballots: Sequence[Ballot]) -> float:
    """1.0 if the most common answer is right, of equally common ones that seen first; 0.0 without any."""
    votes = Counter(ballot.answer for ballot in ballots if ballot.answer is not None)
    if not votes:
        return 0.0
    winner, _ = votes.most_common(1)[0]  # of equals the first that was counted
    return next(ballot.right for ballot in ballots if ballot.answer == winner)


def sample_votes(
    scorer: Scorer,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str],
    options: Options,
    ballot: Callable[[int, str], Ballot],
    limit: CacheLimit | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Samples `options.samples` responses to each prompt; `ballot` reads (number of the prompt, response).

    Sample k of a prompt is the same for any number of samples above k.

    Returns:
        What each prompt's sample line gets, {} without samples, and what `configs` gets: how it was sampled,
        and the seconds of all votes per answer.
    """
    K, n = options.samples, len(prompts)
    if not K:
        return [{} for _ in prompts], {"num_samples": 0}
    asked = (list(prompts) * K, max_new_tokens, stop, TEMPERATURE, options.seed)
    responses = scorer.generate(*asked) if limit is None else [w.text for w in scorer.write(*asked, limit)]
    counted = taken(scorer)
    lines = []
    for i in range(n):
        own = responses[i::n]
        ballots = [ballot(i, response) for response in own]
        lines.append(
            {
                "sampled_resps": own,
                "votes": [vote.answer for vote in ballots],
                maj_key(K): majority_vote(ballots),
            }
        )
    facts = {"num_samples": K, "temperature": TEMPERATURE, "seconds_per_vote": counted["seconds"] / n}
    return lines, facts


def maj_key(num_samples: int) -> str:
    """The metric of the vote, as lm-eval names it."""
    return f"exact_match,maj@{num_samples}"


@dataclass(frozen=True)
class Generation:
    """A task's problems and how its answers are made and read."""

    problems: Sequence[Problem]
    max_new_tokens: int
    stop: tuple[str, ...]
    grade: Callable[[Problem, str], dict[str, Any]]  # the sample line of a response
    ballot: Callable[[dict[str, Any]], Ballot]  # what such a line says in a vote

    def run(self, scorer: Scorer, options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The sample lines of the greedy answers, with the votes if asked for, and fields of TaskResult."""
        prompts = [problem.prompt for problem in self.problems]
        responses = scorer.generate(prompts, self.max_new_tokens, self.stop)
        return self._graded(scorer, options, responses)

    def run_limited(
        self, scorer: Scorer, options: Options, limit: CacheLimit | None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """`run` with a limit of the cache; the lines and fields also tell what the greedy answers cost."""
        prompts = [problem.prompt for problem in self.problems]
        written = scorer.write(prompts, self.max_new_tokens, self.stop, limit=limit)
        lines, found = self._graded(scorer, options, [one.text for one in written], limit)
        for line, one in zip(lines, written, strict=True):
            line.update(generated_tokens=one.tokens, peak_cache_bytes=one.cache_bytes)
        found["config"] |= kv_settings(limit)
        found["totals"] = {
            f"{cost},none": mean_score([line[cost] for line in lines])
            for cost in COSTS
            if lines[0][cost] is not None
        }
        return lines, found

    def at_limits(
        self, scorer: Scorer, options: Options, flags: KVFlags, summarize: Callable[..., TaskResult]
    ) -> list[TaskResult]:
        """A result for each limit that the flags ask for; without any flag the plain one.

        `summarize` makes it of the sample lines and fields of TaskResult. Raises ValueError for a limit that
        the model cannot keep to, before anything is generated.
        """
        limits = flags.limits()
        if flags.kv_budget is None:
            return [summarize(*self.run(scorer, options))]
        for limit in limits:
            scorer.check_limit(limit)
        results = [summarize(*self.run_limited(scorer, options, limit)) for limit in limits]
        return [
            replace(result, task=result.task + limit_mark(limit))
            for result, limit in zip(results, limits, strict=True)
        ]

    def _graded(
        self,
        scorer: Scorer,
        options: Options,
        responses: Sequence[str],
        limit: CacheLimit | None = None,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        counted = taken(scorer)
        votes, facts = sample_votes(
            scorer,
            [problem.prompt for problem in self.problems],
            self.max_new_tokens,
            self.stop,
            options,
            lambda i, response: self.ballot(self.grade(self.problems[i], response)),
            limit,
        )
        lines = [
            self.grade(problem, response) | vote
            for problem, response, vote in zip(self.problems, responses, votes, strict=True)
        ]
        config = {"max_new_tokens": self.max_new_tokens, "until": self.stop, **facts}
        return lines, {**counted, "config": config}


def values_of(samples: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, list[float]]:
    """The per-sample values of these metrics, and of the vote where there was one."""
    voted = [key for key in samples[0] if key.startswith("exact_match,maj@")]
    return {key: [sample[key] for sample in samples] for key in (*keys, *voted)}

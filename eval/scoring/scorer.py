"""Scoring and generation over many prompts: which of them share a batch, and what of it is read once."""

import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.scoring.hf_folder import HFEngine, HFModel, is_hf_folder, load_hf_engine
from eval.scoring.inference import ADAPTIVE, Answer, Depth, Engine, GenerateJob, Job, ScoreJob, ScoreRow
from eval.scoring.journal import Journal, request_key
from eval.scoring.workers import Workers, load_engine
from model import ZeroModel
from model.export_files import TOKENIZER_NAME, load_config
from model.latent_cot.rkv import CacheLimit, check_limit

# Sharing fewer tokens than this saves less than another pass over the layers costs.
MIN_SHARED_TOKENS = 8


class Batch(NamedTuple):
    """What is computed, journaled and counted together."""

    requests: list[int]  # numbers in the call, in the order of the job's rows
    job: Job


class Written(NamedTuple):
    """A completion and what it took."""

    text: str  # cut at the first stop string
    tokens: int  # generated, the last one included
    cache_bytes: int | None  # at most, with the prompt's; None: a Hugging Face network does not tell


class Scorer:
    """A model, its tokenizer and a batch size: log-likelihoods and generation over many prompts.

    Every prompt starts with the `bos` id, as every training document does. Requests are sorted by length, so
    that a batch holds little padding; results come back in the order of the requests. Requests whose context
    was cut from the left, because it did not fit into the model's positions, are counted: `take_truncated`.

    Tokens that requests share are read once: a context by its continuations, and what all contexts begin with
    (exemplars) by the whole call. Where a cache would change the result (ModelConfig.decodes_exactly), every
    request is read as a whole row.
    """

    def __init__(
        self,
        model: ZeroModel,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        workers: Workers | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`workers`, on `device`, compute instead of `model`, which then may be on the meta device.

        Raises ValueError if the batch size is not positive or the two vocabularies differ in size.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, at least 1 is needed")
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has vocab_size {tokenizer.vocab_size}, the model {model.config.vocab_size}:"
                " use the tokenizer.model that the model was trained with"
            )
        make = HFEngine if isinstance(model, HFModel) else Engine
        self.engine, self.workers = make(model, tokenizer), workers
        self.model, self.tokenizer = self.engine.model, tokenizer
        self.batch_size = batch_size
        self.max_length: int = model.config.max_position_embeddings
        self.device = device or self.engine.device
        self.journal: Journal | None = None
        self.depth: Depth = None
        self._num_truncated, self._seconds = 0, 0.0
        self._steps: list[float] = []

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Path,
        batch_size: int = 16,
        num_processes: int = 1,
        trust_remote_code: bool = False,
    ) -> "Scorer":
        """Loads an exported folder (model.safetensors, config.json, tokenizer.model), or a Hugging Face one,
        on a GPU if any.

        With several processes each loads it, on a GPU of its own where there are as many; `close` ends them.
        Results equal those of one process, up to rounding that the number of threads may change.
        A Hugging Face folder's own Python runs only with `trust_remote_code`.
        Raises ValueError or OSError, with a one-line message, if a file is missing, cut or does not fit.
        """
        if not checkpoint.is_dir():
            raise ValueError(f"no checkpoint folder {checkpoint}: --checkpoint takes runs/NAME/export")
        if num_processes < 1:
            raise ValueError(f"num_processes is {num_processes}, at least 1 is needed")
        if num_processes == 1:
            engine = load_engine(checkpoint, trust_remote_code=trust_remote_code)
            return cls(engine.model, engine.tokenizer, batch_size)
        if is_hf_folder(checkpoint):
            engine = load_hf_engine(checkpoint, torch.device("meta"), trust_remote_code)
            model, tokenizer = engine.model, engine.tokenizer
        else:
            with torch.device("meta"):
                model = ZeroModel(load_config(checkpoint))
            tokenizer = Tokenizer(checkpoint / TOKENIZER_NAME)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        scorer = cls(model, tokenizer, batch_size, device=device)
        scorer.workers = Workers(checkpoint, num_processes, trust_remote_code)
        return scorer

    def close(self) -> None:
        """Ends the processes, if there are several."""
        if self.workers is not None:
            self.workers.close()

    # ---- depth, and what was counted

    @property
    def num_steps(self) -> int | None:
        """Loop steps at test time; None: the model's own number, or adaptive."""
        return self.depth if isinstance(self.depth, int) else None

    @num_steps.setter
    def num_steps(self, num_steps: int | None) -> None:
        self.set_depth(num_steps)

    def set_depth(self, depth: Depth) -> None:
        """Loop steps from now on; None: as the model is configured.

        A number is what every token runs, at most if the model learned to halt. "adaptive" is the model's own
        halting, up to its configured number of steps; a model without stops where its prediction (block
        loops) or its state (others) no longer changes: halting.kind=threshold at its default limits.
        Raises ValueError for anything else, and for a model without recurrence unless it is 1.
        """
        looped = self.model.config.recurrence.placement != "none"
        if depth not in (None, ADAPTIVE) and not (isinstance(depth, int) and depth >= 1):
            raise ValueError(f"num_steps is {depth}: it must be at least 1, or {ADAPTIVE}")
        if not looped and depth not in (None, 1):
            raise ValueError(
                f"num_steps is {depth}: a model without recurrence runs once, leave it out or at 1"
            )
        self.depth = depth

    def take_truncated(self) -> int:
        """How many requests were cut since the last call."""
        count, self._num_truncated = self._num_truncated, 0
        return count

    def take_steps(self) -> list[float]:
        """Per request since the last call, in their order: the loop steps run where its answer's tokens are
        predicted, their mean over tokens and loops. Empty for a model without recurrence.
        """
        steps, self._steps = self._steps, []
        return steps

    def take_seconds(self) -> float:
        """Seconds spent inside the model since the last call, summed over the processes; what the journal
        answered counts as when it was computed.
        """
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # ---- log-likelihoods

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Per (context, continuation): the sum of the continuation's log-probabilities (nats), and whether
        greedy decoding would produce it. Raises ValueError for an empty or overlong continuation.
        """
        return self.loglikelihood_tokens([self.encode_pair(*request) for request in requests])

    def loglikelihood_tokens(
        self, encoded: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of token ids: per (context with `bos`, continuation).

        Raises ValueError if a continuation is longer than the model's positions.
        """
        longest = max((len(target) for _, target in encoded), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation of {longest} tokens exceeds the model's max_position_embeddings"
                f" {self.max_length}: shorten it"
            )
        # As in lm-eval: the last token is only predicted, so one more than max_length fits.
        room = self.max_length + 1
        self._num_truncated += sum(len(context) + len(target) > room for context, target in encoded)
        requests = [
            (context[max(0, len(context) + len(target) - room) :], target) for context, target in encoded
        ]
        keys = [("loglikelihood", *request) for request in requests]
        answers = self._answers(list(self._score_batches(requests)), keys, "scoring")
        return [(answer.value[0], answer.value[1]) for answer in answers]

    def _score_batches(self, requests: Sequence[tuple[list[int], list[int]]]) -> Iterator[Batch]:
        """First the continuations that share their context, side by side, then those alone with theirs."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(i)
        # The context's last token is read with each continuation, whose first token it predicts.
        prefix = self._shared_prefix([list(context[:-1]) for context in groups])
        shared, alone = list[list[int]](), list[list[int]]()
        for ids, members in groups.items():
            shares = len(members) > 1 and len(ids) > MIN_SHARED_TOKENS and self._exact()
            kind, found = (shared, [members]) if shares else (alone, [[i] for i in members])
            kind += found
        for kind in (shared, alone):
            for batch in self.by_length([max(sum(map(len, requests[i])) for i in group) for group in kind]):
                members = [i for number in batch for i in kind[number]]
                head = prefix if all(_begins(requests[i][0], prefix) for i in members) else []
                contexts, rows = [[]] if kind is alone else list[list[int]](), []
                for group in (kind[number] for number in batch):
                    own = requests[group[0]][0][len(head) :]
                    if kind is shared:
                        contexts.append(own[:-1])
                        own = own[-1:]
                    for i in group:
                        target = requests[i][1]
                        rows.append(ScoreRow(len(contexts) - 1, own + target[:-1], target))
                yield Batch(members, ScoreJob(head, contexts, rows, self.batch_size, self.depth))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context (with `bos`) and continuation, by lm-eval's rule: white space that ends the
        context belongs to the continuation, and the continuation is what the whole has beyond the context.

        Raises ValueError if the continuation is left without a token.
        """
        stripped = context.rstrip()
        whole = self.tokenizer.encode(context + continuation, bos=True)
        context_ids = self.tokenizer.encode(stripped, bos=True)
        target_ids = whole[len(context_ids) :]
        if not target_ids:
            raise ValueError(
                f"the continuation {continuation!r} after {context[-20:]!r} has no token of its own:"
                " it is empty, or the tokenizer merges it into the context"
            )
        return context_ids, target_ids

    # ---- generation

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """The texts of `write` with the whole cache."""
        return [one.text for one in self.write(prompts, max_new_tokens, stop, temperature, seed)]

    def write(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
        limit: CacheLimit | None = None,
    ) -> list[Written]:
        """Completion of each prompt, at most `max_new_tokens` tokens, cut at the first stop string.

        Greedy at temperature 0; other values divide the logits before sampling, where prompt i's draws are a
        function of (seed, i). A prompt that leaves no room for the new tokens is cut from the left. With a
        limit, R-KV cuts the cache; what it keeps of a row does not depend on the batch. Raises ValueError if
        no prompt could have room, for a negative temperature, or for a limit that the model cannot keep to.
        """
        room = self.max_length - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}: it must be at least 1 and, to leave room for a prompt,"
                f" below the model's max_position_embeddings {self.max_length}"
            )
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: 0 is greedy, and less has no meaning")
        self.check_limit(limit)
        encoded = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        self._num_truncated += sum(len(row) > room for row in encoded)
        encoded = [row[-room:] for row in encoded]
        options = (max_new_tokens, tuple(stop), temperature, seed if temperature else 0, limit)
        keys = [("generate", row, *options, i if temperature else 0) for i, row in enumerate(encoded)]
        prefix, batches = self._shared_prefix([row[:-1] for row in encoded]), []
        for members in self.by_length([len(row) for row in encoded]):
            head = prefix if all(_begins(encoded[i], prefix) for i in members) else []
            rows = [encoded[i][len(head) :] for i in members]
            batches.append(Batch(members, GenerateJob(head, rows, members, *options, self.depth)))
        answers = self._answers(batches, keys, "generating")
        found = []
        for answer in answers:
            ids, cache_bytes = answer.value
            found.append(Written(cut_at_stop(self.tokenizer.decode(ids), stop), len(ids), cache_bytes))
        return found

    def check_limit(self, limit: CacheLimit | None) -> None:
        """Raises ValueError for a limit that the model's cache cannot keep to."""
        if limit is not None and isinstance(self.model, HFModel):
            raise ValueError(
                f"kv_budget={limit.budget}: R-KV cuts the cache of a model of ours, not of a Hugging Face"
                " folder; import it (python -m model.hf import)"
            )
        if limit is not None:
            check_limit(self.model.config, limit)

    # ---- batches

    def compute(self, jobs: Sequence[Job], what: str) -> list[Any]:
        """The one value of each job, from the journal or computed and then kept there; `what` is the label of
        the progress bar.
        """
        batches = [Batch([number], job) for number, job in enumerate(jobs)]
        keys = [(type(job).__name__, *job) for job in jobs]
        return [answer.value for answer in self._answers(batches, keys, what)]

    def _exact(self) -> bool:
        config = self.model.config
        return config.decodes_exactly(self.num_steps or config.recurrence.num_steps)

    def _shared_prefix(self, rows: Sequence[list[int]]) -> list[int]:
        """What all rows begin with, except those that were cut; empty if it is too short to pay off."""
        whole = [row for row in rows if row[:1] == [self.tokenizer.bos_id]]
        prefix = list(os.path.commonprefix(whole)) if len(whole) > 1 and self._exact() else []
        return prefix if len(prefix) >= MIN_SHARED_TOKENS else []

    def _answers(self, batches: Sequence[Batch], parts: Sequence[tuple[Any, ...]], what: str) -> list[Answer]:
        """One answer per request, from the journal or computed and then kept there; `parts` make its key."""
        known: dict[int, Answer] = {}
        keys = [] if self.journal is None else [request_key(*part, self.depth) for part in parts]
        pending = []
        for batch in batches:
            found = [self.journal.get(keys[i]) for i in batch.requests] if self.journal else [None]
            known |= {i: answer for i, answer in zip(batch.requests, found, strict=False) if answer}
            if None in found:  # as a whole: alone its requests would be rounded otherwise
                pending.append(batch)
        with tqdm(total=len(parts), initial=len(known), desc=what, unit="request", leave=False) as progress:
            for number, answers in self._computed([batch.job for batch in pending]):
                requests = pending[number].requests
                known |= dict(zip(requests, answers, strict=True))
                if self.journal:
                    self.journal.put({keys[i]: known[i] for i in requests})
                progress.update(len(requests))
        ordered = [known[i] for i in range(len(parts))]
        self._seconds += sum(answer.seconds for answer in ordered)
        self._steps += [answer.steps for answer in ordered if answer.steps is not None]
        return ordered

    def _computed(self, jobs: Sequence[Job]) -> Iterator[tuple[int, list[Answer]]]:
        if self.workers is not None:
            return self.workers.run(jobs)
        return ((number, self.engine.run(job)) for number, job in enumerate(jobs))

    def by_length(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices in batches, the longest first, so that a batch too large for memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]


def _begins(row: Sequence[int], prefix: Sequence[int]) -> bool:
    return list(row[: len(prefix)]) == list(prefix)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text

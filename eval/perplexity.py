"""Perplexity of text: bits per byte, so that models with different tokenizers compare.

python eval/perplexity.py --checkpoint runs/NAME/export --data FILE [--limit N documents] [--max_length N]

FILE is text, JSON lines (their field `text`), parquet or a tar of texts, read as data_pipeline reads them; or
a folder that data_pipeline/build.py made, whose held-out documents are scored. In a folder of data sets it is
text/tinyshakespeare.txt. bits_per_byte, byte_perplexity and word_perplexity are lm-eval's, of UTF-8 bytes and
of words between white space: every token is scored once, after the tokens before it in its window of the
model's positions (lm-eval's disjoint windows); the first token of a document follows `bos`. Lower is better.
Guessing: bytes drawn evenly (8 bits), and bytes drawn as often as each occurs in this very text.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.shards.held_out import held_out_texts, is_build
from data_pipeline.sources.text import read_jsonl, read_parquet, read_text
from eval.scoring.cli import main, positive_integer
from eval.scoring.core import Score, Scorer
from eval.scoring.results import TaskResult, taken
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data

MAX_NATS = 700.0  # of a byte or a word, whose perplexity is left out: it would not be a finite number
DEFAULT = "text/tinyshakespeare.txt"
Window = tuple[list[int], list[int]]  # context, tokens to score


def load(options: Options, max_length: int | None = None) -> Evaluation:
    """Reads the texts. Raises ValueError for exemplars, which it does not take, and for no text.

    Args:
        max_length: tokens that a window predicts; default: as many as the model has positions.
    """
    if options.num_fewshot:
        raise ValueError(f"perplexity has no exemplars: num_fewshot is {options.num_fewshot}, it must be 0")
    path = options.data if is_build(options.data) else find_data(options.data, DEFAULT)
    documents = [text for text in read_texts(path) if text]
    if not documents:
        raise ValueError(f"{path} holds no text: name another file by --data")
    texts = documents[: options.limit]

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        log_probs = score_texts(scorer, texts, max_length)
        return [
            TaskResult(
                task="perplexity",
                values={},
                totals=metrics(texts, log_probs),
                num_documents=len(documents),
                baselines={"uniform bytes": Score(8.0), "byte frequencies": Score(byte_entropy(texts))},
                samples=[
                    {
                        "doc_id": f"{path.name}-{i}",
                        "group": "perplexity",
                        "prompt": "",
                        "target": text,
                        "resps": p,
                    }
                    for i, (text, p) in enumerate(zip(texts, log_probs, strict=True))
                ],
                data_files=[path] if path.is_file() else [path / "manifest.json"],
                **taken(scorer) | {"num_truncated": 0},  # of windows none is cut
            )
        ]

    return evaluation


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file, by its name, or of a built folder's held-out split."""
    if path.is_dir():
        yield from held_out_texts(path)
    elif re.search(r"\.jsonl(\.\w+)?$", path.name):
        yield from (document.text for document in read_jsonl(path))
    elif path.suffix == ".parquet":
        yield from (document.text for document in read_parquet(path))
    else:
        yield from read_text(path)


def score_texts(scorer: Scorer, texts: Sequence[str], max_length: int | None = None) -> list[float]:
    """Log-probability of each text in nats; for max_length see load.

    Raises:
        ValueError: the model has fewer positions.
    """
    bos, length = scorer.tokenizer.bos_id, max_length or scorer.max_length
    if length > scorer.max_length:
        raise ValueError(f"--max_length {length} exceeds the model's {scorer.max_length} positions: lower it")
    windows = [disjoint_windows(scorer.tokenizer.encode(text), bos, length) for text in texts]
    scores = iter(scorer.loglikelihood_tokens([window for own in windows for window in own]))
    return [math.fsum(next(scores)[0] for _ in own) for own in windows]


def disjoint_windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[Window]:
    """All tokens once, as targets of windows with at least one token of context (`prefix` for the first).

    lm-eval's rule (get_rolling_token_windows with a context of 1, make_disjoint_window): a window predicts as
    many tokens as the model has positions, and what is left at the end gets the tokens before it as context,
    as many as fit.
    """
    windows = []
    for start in range(0, len(tokens), max_length):
        target = list(tokens[start : start + max_length])
        first = max(0, start + len(target) - max_length - 1)
        windows.append((list(tokens[first:start]) or [prefix], target))
    return windows


def metrics(texts: Sequence[str], log_probs: Sequence[float]) -> dict[str, float | Score]:
    """lm-eval's three, with standard errors over the documents: of a ratio, and by the delta method."""
    found: dict[str, float | Score] = {}
    sizes = {
        "byte": [len(text.encode()) for text in texts],
        "word": [len(re.split(r"\s+", text)) for text in texts],
    }
    for unit, counts in sizes.items():
        nats = ratio([-p for p in log_probs], counts)
        if unit == "byte":
            found["bits_per_byte,none"] = Score(
                nats.value / math.log(2), nats.stderr and nats.stderr / math.log(2)
            )
        if nats.value > MAX_NATS:
            continue
        perplexity = math.exp(nats.value)
        found[f"{unit}_perplexity,none"] = Score(perplexity, nats.stderr and perplexity * nats.stderr)
    return found


def ratio(numerators: Sequence[float], denominators: Sequence[int]) -> Score:
    """Sum over sum, with the standard error of the linearised ratio (None for a single document)."""
    n, total = len(numerators), sum(denominators)
    value = math.fsum(numerators) / total
    if n == 1:
        return Score(value)
    squares = math.fsum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return Score(value, math.sqrt(squares * n / (n - 1)) / total)


def byte_entropy(texts: Sequence[str]) -> float:
    """Bits of a byte under the frequencies of all bytes."""
    counts = Counter[int]()
    for text in texts:
        counts.update(text.encode())
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


FLAGS = {
    "--max_length": {
        "type": positive_integer,
        "metavar": "N",
        "help": "tokens that a window predicts (default: as many as the model has positions)",
    }
}
TASK = EvaluationTask("perplexity", load, flags=FLAGS)

if __name__ == "__main__":
    main(TASK, __doc__)

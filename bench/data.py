"""The data pipeline against others doing the same work, interleaved in one run, one thread, in CPU-seconds.

    OMP_NUM_THREADS=1 python bench/data.py [--data DIR] [--tasks read,prepare] [--out FILE.json]

read: batches of tokens and targets, without and with document boundaries, from the page cache; ours, which
is shuffled and checked and always has boundaries, appears in both. encode, prepare: text to tokens, jsonl to
packed rows. resume: wall-clock seconds from a cold start to the batch of step 10^9. memory: growth of the
resident set. The corpus is Wikipedia text, or pseudo-words where that is missing, cut to the same lengths.
"""

import argparse
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
import transformers
import webdataset
from data_corpus import (
    LEARNT_BYTES,
    MEMMAP,
    ONE,
    SOURCE,
    Corpus,
    check_loader,
    check_peers,
    make_corpus,
    peer_readers,
    write_jsonl,
)
from data_peers import Shape, datasets_version, fast_tokenizer, tokenise_and_group
from measuring import (
    Seconds,
    check_at_least,
    check_choices,
    interleaved,
    listed,
    print_table,
    spread,
    status_bytes,
)
from tqdm import tqdm

from common.errors import user_errors
from common.files import write_json
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.packing import PACKINGS
from data_pipeline.shards.format import EncodedDocument, token_dtype
from data_pipeline.shards.manifest import TOKENIZER, Manifest, Source, Split, write_manifest
from data_pipeline.shards.writer import write_shards
from data_pipeline.sources.text import read_jsonl
from data_pipeline.tokenization.tokenizer import MODEL_TYPES, Tokenizer, train_tokenizer

TASKS = ("memory", "resume", "read", "prepare")
RESUMED_STEP = 10**9
GROUPED = "transformers + datasets"
SAME_PIECES = 0.98  # share of documents that both tokenizers split into the same pieces
# Smallest ratios to the others, then absolute limits: MB/CPU-s, seconds, MiB.
READ_TARGETS = {MEMMAP: 1.0, ONE: 20.0}
PREPARE_TARGET, ENCODE_TARGET, RESUME_TARGET, MEMORY_TARGET = 2.0, 4.0, 1.0, 1.0


@dataclass
class Line:
    """One line of the table."""

    task: str
    name: str
    unit: str
    values: list[float]  # one per run; empty: not measured, `note` says why
    ratios: dict[str, float] = field(default_factory=dict)  # each of our medians over this one's
    target: float | None = None  # for each ratio, or without ratios for the median
    at_most: bool = False  # the target is an upper limit
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where there is no target or nothing was measured."""
        if self.target is None or not self.values:
            return None
        found = list(self.ratios.values()) or [statistics.median(self.values)]
        return max(found) <= self.target if self.at_most else min(found) >= self.target


def main() -> None:
    with user_errors(ValueError, OSError):
        _run(_parse())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the data pipeline's speed with others'.")
    add = parser.add_argument
    data = Path(os.environ.get("DATA_ROOT", "data"))
    add("--data", type=Path, default=data, help="folder of the data sets (default: DATA_ROOT, else data)")
    add("--tasks", type=listed, default=list(TASKS), help=f"comma-separated (default: {','.join(TASKS)})")
    add("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    add("--rows", type=int, default=8, help="rows per batch (default: 8)")
    add("--length", type=int, default=2048, help="tokens per row (default: 2048)")
    add("--batches", type=int, default=500, help="batches per run of a reader (default: 500)")
    add("--characters", type=int, default=20_000_000, help="of the corpus (default: 20 million)")
    add("--prepared", type=int, default=2_000_000, help="characters to prepare (default: 2 million)")
    add("--vocab_size", type=int, default=16384, help="pieces of the tokenizers (default: 16384)")
    add(
        "--memory_batches",
        type=int,
        default=100_000,
        help="batches to watch memory over (default: 10^5)",
    )
    add("--out", type=Path, metavar="FILE.json", help="machine, versions, command and every timing")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    check_choices("tasks", arguments.tasks, TASKS)
    lowest = {"runs": 1, "rows": 1, "length": 2, "batches": 1, "memory_batches": 10}
    lowest |= {"characters": 1000, "prepared": 1000, "vocab_size": 300}
    check_at_least({flag: (getattr(arguments, flag), limit) for flag, limit in lowest.items()})
    if arguments.vocab_size > 65_536:
        raise ValueError(
            f"--vocab_size={arguments.vocab_size} must be at most 65536, for tokens of two bytes"
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(arguments.data, Path(folder), arguments.characters, arguments.vocab_size)
        print(f"{corpus.kind}: {corpus.stream.tokens:,} tokens, {len(corpus.stream.prompt_ends):,} documents")
        functions = {"memory": _memory, "resume": _resume, "read": _read, "prepare": _prepare}
        lines = [line for task in arguments.tasks for line in functions[task](arguments, corpus)]
        about = {"kind": corpus.kind, "tokens": corpus.stream.tokens}
    if arguments.out:
        chosen = {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items()}
        report = {"machine": machine(), "arguments": chosen, "corpus": about}
        rows = [asdict(line) | {"met": line.met} for line in lines]
        write_json(arguments.out, {**report, "results": rows}, indent=2)
    _print_lines(arguments, lines)


# ---- what is measured


def _loader(arguments: argparse.Namespace, data: Path, packing: str) -> Loader:
    return Loader(data, arguments.length, arguments.rows, seed=0, packing=packing)


def _memory(arguments: argparse.Namespace, corpus: Corpus) -> list[Line]:
    """Growth of the resident set after a warm-up of an epoch and a tenth of the batches."""
    lines = []
    for packing in PACKINGS:
        loader, count = _loader(arguments, corpus.data, packing), arguments.memory_batches
        warm = max(count // 10, loader.rows[SOURCE] // arguments.rows + 1)
        for step in range(warm):
            loader.batch(step)
        before = status_bytes("VmRSS")
        for step in tqdm(range(warm, warm + count), desc=f"memory, {packing}", unit="batch"):
            loader.batch(step)
        grown = (status_bytes("VmRSS") - before) / 2**20
        task = f"memory, {count:,} batches"
        lines.append(Line(task, f"ours, {packing}", "MiB", [grown], target=MEMORY_TARGET, at_most=True))
    return lines


def _resume(arguments: argparse.Namespace, corpus: Corpus) -> list[Line]:
    lines = []
    for packing in PACKINGS:
        seconds = []
        for _ in range(arguments.runs):
            start = time.perf_counter()
            _loader(arguments, corpus.data, packing).batch(RESUMED_STEP)
            seconds.append(time.perf_counter() - start)
        name = f"ours, {packing}"
        lines.append(Line("resume at step 10^9", name, "s", seconds, target=RESUME_TARGET, at_most=True))
    return lines


def _read(arguments: argparse.Namespace, corpus: Corpus) -> list[Line]:
    loaders = {f"ours, {packing}": _loader(arguments, corpus.data, packing) for packing in PACKINGS}
    concat = loaders["ours, concat"]
    if concat.rows[SOURCE] <= arguments.rows:
        raise ValueError(
            f"--characters={arguments.characters} make {concat.rows[SOURCE]} rows, which must exceed "
            f"--rows={arguments.rows}; raise it"
        )
    plain = Shape(arguments.rows, arguments.length, None)
    tasks = {"read": plain, "read, boundaries": plain._replace(segments=concat.batch(0).cu_seqlens.shape[1])}
    steps: dict[str, Callable[[], Any]] = {}
    for name, loader in loaders.items():
        check_loader(corpus, loader)
        steps[name] = partial(next, map(loader.batch, itertools.count()))
    for task, shape in tasks.items():
        check_peers(corpus, shape)
        steps |= {task + name: partial(next, reader) for name, reader in peer_readers(corpus, shape).items()}
    print("over an epoch every reader gave the same tokens, targets and boundaries")
    runs: dict[str, Callable[[], Seconds]]
    runs = {name: partial(_timed, partial(_repeat, step, arguments.batches)) for name, step in steps.items()}
    seconds = interleaved(arguments.runs, "read", runs)["cpu"]
    megatokens = arguments.batches * arguments.rows * arguments.length / 1e6
    rates = {name: [megatokens / s for s in values] for name, values in seconds.items()}
    for name, loader in loaders.items():  # padding does not count
        filled = 1 - loader.padded_tokens[SOURCE] / (loader.rows[SOURCE] * arguments.length)
        rates[name] = [rate * filled for rate in rates[name]]
    own = {name: rates[name] for name in loaders}
    lines = []
    for task, shape in tasks.items():
        theirs = {name: rates[task + name] for name in peer_readers(corpus, shape)}
        lines += _compared(task, "Mtok/CPU-s", own, theirs, READ_TARGETS)
    return lines


def _repeat(step: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        step()


def _timed(function: Callable[[], Any]) -> Seconds:
    start = time.process_time()
    function()
    return {"cpu": time.process_time() - start}


def _compared(
    task: str,
    unit: str,
    own: dict[str, list[float]],
    theirs: dict[str, list[float]],
    targets: dict[str, float],
) -> list[Line]:
    """Our lines, then theirs with how many times as fast ours are."""
    lines = [Line(task, name, unit, values) for name, values in own.items()]
    for name, values in theirs.items():
        ratios = {key: statistics.median(v) / statistics.median(values) for key, v in own.items()}
        lines.append(Line(task, name, unit, values, ratios, targets.get(name)))
    return lines


def _prepare(arguments: argparse.Namespace, corpus: Corpus) -> list[Line]:
    texts = _first(corpus.texts, arguments.prepared)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    jsonl = corpus.folder / "prepare.jsonl"
    write_jsonl(jsonl, texts)
    lines = []
    for kind in MODEL_TYPES:
        model = corpus.folder / f"{kind}.model"
        model.write_bytes(train_tokenizer(_first(corpus.texts, LEARNT_BYTES), arguments.vocab_size, kind))
        ours, theirs = Tokenizer(model), fast_tokenizer(model)
        _check_same_pieces(kind, ours, theirs, texts)
        encode: dict[str, Callable[[], Seconds]] = {
            "ours": partial(_timed, partial(ours.encode_batch, texts, bos=True, eos=True)),
            "tokenizers": partial(_timed, partial(theirs, texts)),
        }
        jobs: dict[str, Callable[[], Seconds]] = {
            "ours": partial(_timed, partial(tokenise_and_pack, arguments, jsonl, model))
        }
        if datasets_version():
            jobs[GROUPED] = partial(_timed, partial(tokenise_and_group, jsonl, theirs, arguments.length))
        for task, functions in ((f"encode, {kind}", encode), (f"tokenise and pack, {kind}", jobs)):
            seconds = interleaved(arguments.runs, task, functions)["cpu"]
            rates = {name: [megabytes / s for s in values] for name, values in seconds.items()}
            own = {"ours": rates.pop("ours")}
            found = _compared(task, "MB/CPU-s", own, rates, {GROUPED: PREPARE_TARGET})
            found[0].target = ENCODE_TARGET if functions is encode else None
            lines += found
        if not datasets_version():
            note = "datasets is not installed: pip install datasets"
            lines.append(Line(task, GROUPED, "MB/CPU-s", [], target=PREPARE_TARGET, note=note))
    return lines


def _first(texts: list[str], characters: int) -> list[str]:
    """The first texts, until they hold this many characters."""
    return texts[: int(np.searchsorted(np.cumsum([len(text) for text in texts]), characters)) + 1]


def _check_same_pieces(kind: str, ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    """Raises ValueError unless nearly all texts become the same tokens; ties may be broken differently."""
    found = ours.encode_batch(texts, bos=True, eos=True)
    same = sum(map(list.__eq__, found, theirs(texts)["input_ids"])) / len(texts)
    if same < SAME_PIECES:
        raise ValueError(f"{kind}: {same:.1%} of the texts have the same tokens, less than {SAME_PIECES:.0%}")
    print(f"{kind}: {same:.1%} of {len(texts):,} texts have the same tokens in both")


def tokenise_and_pack(arguments: argparse.Namespace, jsonl: Path, model: Path) -> None:
    """From a jsonl file to a data folder with a manifest; then reads every row once."""
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), Tokenizer(model)
        shutil.copyfile(model, folder / TOKENIZER)
        documents = read_jsonl(jsonl, ("text",))
        encoded = (EncodedDocument(tokenizer.encode(d.text, bos=True, eos=True)) for d in documents)
        dtype = token_dtype(tokenizer.vocab_size)
        shards = write_shards(folder, f"{SOURCE}-train", encoded, dtype)
        counts = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        splits = {"train": Split(*counts, 0, shards), "validation": Split(0, 0, 0, ())}
        sources = {SOURCE: Source(1.0, splits)}
        about = model.stat().st_size, tokenizer.sha256, tokenizer.vocab_size, dtype
        write_manifest(Manifest(folder, "", "", {}, *about, sources))
        loader = _loader(arguments, folder, "best_fit")
        _repeat(
            partial(next, map(loader.batch, itertools.count())), -(-loader.rows[SOURCE] // arguments.rows)
        )


# ---- the report


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "command": sys.argv,
        "platform": platform.platform(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "sentencepiece": sentencepiece.__version__,
        "webdataset": webdataset.__version__,
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets_version(),
    }


def _print_lines(arguments: argparse.Namespace, lines: list[Line]) -> None:
    here = machine()
    keys = ("numpy", "sentencepiece", "webdataset", "tokenizers", "transformers", "datasets")
    print(f"\nrows of {arguments.length} tokens, {arguments.rows} a batch; load {here['load']:.1f}; ", end="")
    print(", ".join(f"{key} {here[key]}" for key in keys if here[key]), end="; ")
    print(f"medians of {arguments.runs} (smallest-largest); ratio: each of ours over the line's\n")
    table: list[tuple[str, ...]] = [("task", "who", "unit", "median", "ratio", "target", "")]
    for line in lines:
        digits = 3 if line.unit == "s" else 1
        values = spread(line.values, digits) if line.values else line.note
        ratios = ", ".join(f"{ratio:.2f}" for ratio in line.ratios.values())
        target = "" if line.target is None else f"{'<=' if line.at_most else '>='} {line.target:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[line.met]
        table.append((line.task, line.name, line.unit, values, ratios, target, verdict))
    print_table(table)


if __name__ == "__main__":
    main()

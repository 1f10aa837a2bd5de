"""bench/data.py: at sizes that say nothing about speed, as a user runs it; and that its checks can fail."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
BENCH = Path(__file__).parents[1] / "bench"
FLAGS = {"--runs": 2, "--rows": 3, "--length": 64, "--batches": 5, "--memory_batches": 100}
FLAGS |= {"--characters": 60_000, "--prepared": 5_000, "--vocab_size": 400}
PEERS = {
    "memmap",
    "webdataset, 1 document per sample",
    "webdataset, 64 documents per sample",
    "webdataset on our shards",
}
OURS = {"ours, concat", "ours, best_fit"}


@pytest.fixture
def bench(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("data")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        make = importlib.import_module("data_corpus").make_corpus
    return make(Path("no such folder"), tmp_path_factory.mktemp("corpus"), 60_000, 400)


def test_the_command_prints_the_table(tmp_path):
    out = tmp_path / "new" / "data.json"
    flags = [str(part) for flag in FLAGS.items() for part in flag]
    command = [sys.executable, str(BENCH / "data.py"), "--data", str(tmp_path), "--out", str(out), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "over an epoch every reader gave the same tokens, targets and boundaries" in done.stdout
    report = json.loads(out.read_text())
    assert report["machine"]["command"] == command[1:]
    assert report["machine"]["threads"] == "1"
    assert report["machine"]["numpy"] == np.__version__
    assert report["corpus"]["kind"] == "pseudo-words"
    names: dict[str, set[str]] = {}
    table = done.stdout.splitlines()
    for line in report["results"]:
        task, name, values = line["task"], line["name"], line["values"]
        names.setdefault(task, set()).add(name)
        shown = next(row for row in table if row.startswith(task + "  ") and f"  {name}  " in row)
        assert shown.endswith({True: "met", False: "MISSED"}.get(line["met"], shown))
        if not values:
            assert report["machine"]["datasets"] is None
            assert "datasets is not installed" in shown
            continue
        assert len(values) == (1 if task.startswith("memory") else 2)
        assert task.startswith("memory") or min(values) > 0
        of_task = {r["name"]: r["values"] for r in report["results"] if r["task"] == task}
        for ours, ratio in line["ratios"].items():
            assert ratio == pytest.approx(np.median(of_task[ours]) / np.median(values))
            assert f"{ratio:.2f}" in shown
    prepared = {"ours", "transformers + datasets"}
    assert names == {
        "memory, 100 batches": OURS,
        "resume at step 10^9": OURS,
        "read": OURS | PEERS,
        "read, boundaries": OURS | PEERS,
        **{f"encode, {kind}": {"ours", "tokenizers"} for kind in ("bpe", "unigram")},
        **{f"tokenise and pack, {kind}": prepared for kind in ("bpe", "unigram")},
    }


def test_every_reader_gives_the_rows_of_the_corpus(bench, corpus):
    """Independently of the bench: documents as lists, row by row."""
    peers = importlib.import_module("data_peers")
    corpora = importlib.import_module("data_corpus")
    starts, flat = corpus.stream.document_starts.tolist(), corpus.flat.tolist()
    rows, T = (len(flat) - 1) // 64, 64
    last = {stop - 1 for stop in starts[1:]}
    order = corpora.peer_order(corpus, T).tolist()
    assert sorted(order) == list(range(rows))
    for segments in (None, 12):
        for name, batches in corpora.peer_readers(corpus, peers.Shape(3, T, segments)).items():
            for epoch in range(2):
                for first in range(0, rows - 2, 3):
                    found = next(batches)
                    for place in range(3):
                        row = (order if name == "memmap" else range(rows))[first + place]
                        begin = row * T
                        targets = flat[begin + 1 : begin + T + 1]
                        if segments:
                            inside = range(begin, begin + T)
                            targets = [-100 if i in last else t for i, t in zip(inside, targets, strict=True)]
                            cu = [0, *(s - begin for s in starts if begin < s < begin + T)]
                            assert found.cu_seqlens[place].tolist() == cu + [T] * (12 - len(cu))
                        assert found.tokens[place].tolist() == flat[begin : begin + T], (name, epoch, row)
                        assert found.targets[place].tolist() == targets, (name, epoch, row)


def test_readers_of_another_corpus_are_refused(bench, corpus):
    peers, corpora = importlib.import_module("data_peers"), importlib.import_module("data_corpus")
    shape = peers.Shape(3, 64, 12)
    loaders = [bench.Loader(corpus.data, 64, 3, seed=0, packing=kind) for kind in ("concat", "best_fit")]
    corpora.check_peers(corpus, shape)
    for loader in loaders:
        corpora.check_loader(corpus, loader)
    flat = corpus.flat.copy()
    flat[1234] = 300 if flat[1234] != 300 else 301
    other = replace(corpus, flat=flat)
    with pytest.raises(ValueError, match="memmap: row"):
        corpora.check_peers(other, shape)
    with pytest.raises(ValueError, match="ours: row 19 "):
        corpora.check_loader(other, loaders[0])
    with pytest.raises(ValueError, match="ours gives"):
        corpora.check_loader(other, loaders[1])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_fast_tokenizer_matches_ours(bench, corpus, kind, tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(bench.train_tokenizer(corpus.texts, 400, kind))
    ours, theirs = bench.Tokenizer(model), bench.fast_tokenizer(model)
    for text in ("one two  three\n\n12.5 \u00e9\U0001f600 a\tb", *corpus.texts[:20]):
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, eos=True)
    with pytest.raises(ValueError, match="of the texts have the same tokens"):
        bench._check_same_pieces(kind, ours, lambda texts: {"input_ids": [[2]] * len(texts)}, ["a", "b"])


def test_verdicts(bench):
    def met(
        values: list[float], ratios: dict[str, float], target: float | None, at_most: bool
    ) -> bool | None:
        return bench.Line("task", "who", "s", values, ratios, target, at_most).met

    assert met([1.0], {"a": 2.0, "b": 3.0}, 2.0, False) is True
    assert met([1.0], {"a": 1.9, "b": 3.0}, 2.0, False) is False
    assert met([0.5, 0.9, 7.0], {}, 1.0, True) is True
    assert met([0.5, 1.1, 7.0], {}, 1.0, True) is False
    assert met([4.0], {}, 4.0, False) is True
    assert met([1.0], {"a": 1.0}, None, False) is None
    assert met([], {}, 2.0, False) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "read,write"], "--tasks=write is unknown"),
        (["--vocab_size", "65537"], "--vocab_size=65537 must be at most 65536"),
        (["--length", "1"], "--length=1 must be at least 2"),
        (["--tasks", "read", "--characters", "1000", "--vocab_size", "300"], "raise it"),
    ],
)
def test_a_mistake_is_one_line(flags, message, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(tmp_path), "--length", "64", *flags])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]

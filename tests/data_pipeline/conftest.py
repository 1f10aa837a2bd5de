"""Synthetic built data folders: random tokens, so that every token is known to the tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.files import write_file
from data_pipeline.loading.packing import Packing, Rows
from data_pipeline.shards.format import EncodedDocument
from data_pipeline.shards.manifest import Manifest, Source, Split, write_manifest
from data_pipeline.shards.writer import write_shards
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer

Documents = dict[str, dict[str, list[list[int]]]]  # source -> split -> documents


def random_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[2, *rng.integers(4, 260, rng.integers(0, longest)).tolist(), 3] for _ in range(count)]


def prompt_length(source: str, text: list[int]) -> int:
    """Documents of "long" have masked prompts of every kind: none, a part, nearly all."""
    return sum(text) % len(text) if source == "long" else 0


def read_row(packing: Packing, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, segment starts) of one row, the padding's start included."""
    plan = packing.plan(np.array([row]), packing.max_segments + 1)
    tokens_per_row = int(plan.cu_seqlens[0, -1])
    rows = Rows(1, tokens_per_row, packing.max_segments + 1)
    packing.read(plan, 0, 1, rows, np.array([0]))
    cu = rows.cu_seqlens[0]
    return rows.tokens[0], rows.targets[0], cu[cu < tokens_per_row]


@pytest.fixture(scope="session")
def documents() -> Documents:
    return {
        "short": {"train": random_documents(0, 700, 12), "validation": random_documents(1, 30, 12)},
        "long": {"train": random_documents(2, 60, 300), "validation": random_documents(3, 5, 300)},
    }


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    def make(folder: Path, documents: Documents, shard_bytes: int = 4000) -> Path:
        folder.mkdir()
        model = train_tokenizer(["some text"], 300)
        write_file(folder / "tokenizer.model", model)
        tokenizer = Tokenizer(folder / "tokenizer.model")
        sources = {}
        for name, splits in documents.items():
            written = {}
            for split, texts in splits.items():
                encoded = [EncodedDocument(text, prompt_length(name, text)) for text in texts]
                shards = write_shards(folder, f"{name}-{split}", encoded, "<u2", shard_bytes)
                written[split] = Split(
                    len(texts), sum(map(len, texts)), sum(len(text) - 2 for text in texts), shards
                )  # each token but bos and eos is a byte
            sources[name] = Source(0.75 if name == "short" else 0.25, written)
        write_manifest(
            Manifest(
                folder, "", "hash", {}, len(model), tokenizer.sha256, tokenizer.vocab_size, "<u2", sources
            )
        )
        return folder

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory, make_folder, documents) -> Path:
    """A whole folder of two sources; read only."""
    return make_folder(tmp_path_factory.mktemp("built") / "data", documents)


@pytest.fixture
def copy(tmp_path, make_folder, documents) -> Path:
    """The same folder, to be damaged."""
    return make_folder(tmp_path / "data", documents)

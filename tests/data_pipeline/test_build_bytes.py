"""A change of the code that changes the bytes of a build is noticed, and OUTPUT_VERSION says so to users."""

import hashlib
import json
import random
from pathlib import Path

import yaml

from data_pipeline.build import build
from data_pipeline.recipe import load_recipe
from data_pipeline.staging import inputs

# OUTPUT_VERSION -> sha256 of everything that the recipe below builds. If it differs, and the change is meant:
# raise the version and write the new value here.
DIGESTS = {1: "5ac3b1c847c3ee0442c3cf320dff5b40503f0322becf29fb1b3b26aede489ddb"}

# Every kind of document, all steps of cleaning that need no test sets, and a tokenizer of integers: the
# scores of a unigram model may differ between processors.
TRACE = "Why is {i}?||<<{i}+1={j}>> <<{j}*2={k}>> #### {k}"
SOURCES = [
    {"name": "prose", "kind": "text", "weight": 1, "files": ["a.txt", "b.txt"], "cleaning": ["quality"]},
    {"name": "rows", "kind": "jsonl", "weight": 0.5, "files": ["rows.jsonl"], "prompt": "q",
     "completion": "a", "mask_prompt": True, "cleaning": ["exact", "near"]},
    {"name": "traced", "kind": "icot", "weight": 0.25, "files": ["traced.txt"], "max_documents": 25},
    {"name": "hop", "kind": "p_hop", "weight": 1, "num_samples": 30},
    {"name": "loop", "kind": "causal_loop", "weight": 1, "num_samples": 20, "levels": [1, 2]},
]  # fmt: skip
WORDS = [
    "the",
    "of",
    "to",
    "and",
    "have",
    "that",
    "water",
    "river\nbridge,",
    "house.\nman",
    "1234",
    "ité",
    "東京▁",
]
RECIPE = {
    "name": "bytes",
    "seed": 7,
    "validation_fraction": 0.2,
    "tokenizer": {"vocab_size": 360, "train_bytes": 9000, "model_type": "bpe", "thought_pieces": True},
    "cleaning": {"quality": {"min_words": 20}},
    "sources": SOURCES,
}


def test_the_bytes_of_this_version(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    draw = random.Random(1)
    for name in ("a.txt", "b.txt"):
        texts = (" ".join(draw.choices(WORDS, k=500)) + ".\n\n" for _ in range(6))
        (raw / name).write_text("".join(texts) + "short\n" * 400)
    rows = [{"q": f"How much is {i % 20}?", "a": f" {i % 20} and a row of alpha beta"} for i in range(30)]
    long = " ".join(draw.choices(WORDS, k=300))
    rows += [{"q": "Why?", "a": long}, {"q": "Why?", "a": f"{long} again"}]
    (raw / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (raw / "traced.txt").write_text(
        "".join(TRACE.format(i=i, j=i + 1, k=2 * i + 2) + "\n" for i in range(30))
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    build(load_recipe(tmp_path / "recipe.yaml"), raw, tmp_path / "out", workers=1)
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "out").iterdir()):
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    assert max(DIGESTS) == inputs.OUTPUT_VERSION
    assert DIGESTS[inputs.OUTPUT_VERSION] == digest.hexdigest()

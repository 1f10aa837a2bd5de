from pathlib import Path

import pytest
import yaml

from common.files import write_file
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.format import EncodedDocument
from data_pipeline.shards.manifest import Manifest, Source, Split, write_manifest
from data_pipeline.shards.writer import write_shards
from data_pipeline.show_step import main
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder over two sources: questions with masked prompts, and labelled digits."""
    root = tmp_path_factory.mktemp("run")
    model = train_tokenizer(["Question and Answer 0123456789"], 400)
    (root / "data").mkdir()
    write_file(root / "data" / "tokenizer.model", model)
    write_file(root / "tokenizer.model", model)
    t = Tokenizer(root / "tokenizer.model")
    asked = []
    for i in range(40):
        prompt = t.encode(f"Question {i}?\n", bos=True)
        asked.append(EncodedDocument([*prompt, *t.encode(f"Answer {i}.", eos=True)], len(prompt)))
    digits = []
    for i in range(40):
        tokens = t.encode(f"{1000 + i}", bos=True)
        digits.append(EncodedDocument(tokens, 0, [-100] * (len(tokens) - 1) + t.encode("7")))
    sources = {}
    for name, documents in (("asked", asked), ("digits", digits)):
        shards = write_shards(root / "data", f"{name}-train", documents, "<u2")
        split = Split(40, sum(len(d.tokens) for d in documents), 0, shards)
        sources[name] = Source(1.0, {"train": split}, name == "digits")
    write_manifest(Manifest(root / "data", "", "", {}, len(model), t.sha256, t.vocab_size, "<u2", sources))
    config = {
        "seed": 3,
        "global_batch_size": 4,
        "data": {
            "path": str(root / "data"),
            "sequence_length": 64,
            "packing": "best_fit",
            "tokenizer": None,
            "stages": [
                {"tokens": 0, "weights": {"asked": 1.0}},
                {"tokens": 257, "weights": {"asked": 1.0, "digits": 3.0}},
            ],
            "shuffle_shards": 0,
            "max_damaged_rows": 0,
            "cache": None,
            "cache_bytes": None,
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    main([str(a) for a in arguments])
    return capsys.readouterr().out.splitlines()


def test_shows_rows_segments_and_masked_prompts(run, capsys):
    lines = shown(capsys, "--run", run, "--step", 2)  # 256 tokens per step: still the first stage
    assert lines[0].startswith("step 2, rank 0 of 1: 4 rows of 64 tokens, ")
    rows = [line for line in lines if line.startswith("row ")]
    assert [line.split(",")[0].split("source ")[1] for line in rows] == ["asked"] * 4
    loader = Loader(run / "data", 64, 4, 3, packing="best_fit")
    segments = [line.split(") ", 1)[1] for line in lines if line.startswith("  [")]
    assert len(segments) > 4
    for segment in segments:
        number = segment.split("Question ")[1].split("?")[0]
        assert segment == f"<s>⟦Question {number}?\\n⟧Answer {number}.</s>"
    assert int(lines[0].split(", ")[-1].split()[0]) > 0
    assert loader.rows["asked"] > 0


def test_shows_labels_and_the_share_of_a_rank(run, capsys):
    whole = shown(capsys, "--run", run, "--step", 30)  # of the second stage
    assert any("source digits" in line for line in whole)
    labelled = [line for line in whole if "labels: " in line]
    assert labelled
    assert all(line.endswith("'7'") for line in labelled)
    rows = [line.split(":", 1)[1] for line in whole if line.startswith("row ")]
    halves = [shown(capsys, "--run", run, "--step", 30, "--rank", r, "--world_size", 2) for r in (0, 1)]
    assert [line.split(":", 1)[1] for half in halves for line in half if line.startswith("row ")] == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--run": "nowhere"}, "nowhere has no config.yaml"),
        ({"--step": 0}, "--step 0 is below 1"),
        ({"--rank": 2, "--world_size": 2}, "--rank 2 is not in 0..1"),
        ({"--world_size": 3}, "global_batch_size 4 does not divide"),
    ],
)
def test_user_mistakes_are_one_line(run, capsys, change, message):
    arguments = {"--run": run, "--step": 1, **change}
    with pytest.raises(SystemExit) as stop:
        main([str(part) for pair in arguments.items() for part in pair])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_data_built_again_with_another_tokenizer(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(["other text"], 300))
    with pytest.raises(SystemExit):
        main(["--run", str(tmp_path), "--step", "1"])
    assert "was built again" in capsys.readouterr().err

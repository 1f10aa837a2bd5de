"""Every synthetic task, from its record: what derives from it is there and agrees with it."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from data_pipeline import tasks
from data_pipeline.build import build
from data_pipeline.errors import DataError
from data_pipeline.generate import main
from data_pipeline.recipe import load_recipe, source_options
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.sources.documents import Document, LabelledDocument, TracedDocument
from data_pipeline.sources.registry import KINDS, read_documents
from data_pipeline.tasks.registry import TASKS
from data_pipeline.tokenization.tokenizer import Tokenizer
from experiments.tasks import read_tasks

RECIPES = Path(__file__).parents[2] / "data_pipeline" / "recipes"

# The recipe of a task, where it is not called after it.
RECIPE_OF = {"causal_loop": "demo"}
LABELLED = [name for name, task in TASKS.items() if task.labelled]


def test_every_file_of_a_task_is_found_and_named_after_it():
    """Not task.py itself, nor what tasks share."""
    shared = {"__init__", "task", "registry", "labelled", "splits"}
    assert set(TASKS) == {path.stem for path in Path(tasks.__file__).parent.glob("*.py")} - shared
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_recipe_names_every_size_and_its_defaults_are_those_of_the_record(name):
    """Except the demo's recipe, which has levels of its own."""
    (source,) = load_recipe(RECIPES / f"{RECIPE_OF.get(name, name)}.yaml").sources
    assert source["kind"] == name
    sizes = source_options(source)
    assert set(sizes) >= {f.name for f in fields(TASKS[name].options)}
    if name not in RECIPE_OF:
        defaults = asdict(TASKS[name].options())
        if "families" in defaults:  # in another order
            defaults["families"], sizes["families"] = set(defaults["families"]), set(sizes["families"])
        assert {key: sizes[key] for key in defaults} == defaults


@pytest.mark.parametrize("name", TASKS)
def test_source_kinds_give_the_documents_of_the_record(name, tmp_path):
    task = TASKS[name]
    samples = list(task.samples(20, task.options(), seed=3, split="test"))
    given = {"num_samples": 20, "seed": 3, "split": "test"}
    assert (task.labelled is None) != (task.plain is None)
    found = list(read_documents(name, tmp_path, given))
    if task.labelled is not None:
        assert found == [task.labelled(sample) for sample in samples]
        assert all(isinstance(document, LabelledDocument) for document in found)
    else:
        assert found == [task.plain(sample, task.plain_options()) for sample in samples]
        assert all(isinstance(document, Document) for document in found)
    assert (f"{name}_traced" in KINDS) == (task.traced is not None)
    if task.traced is not None:
        traced = list(read_documents(f"{name}_traced", tmp_path, given))
        assert traced == [task.traced(sample) for sample in samples]
        assert all(isinstance(document, TracedDocument) for document in traced)
    with pytest.raises(DataError, match="num_sample is not a known key"):
        list(read_documents(name, tmp_path, {"num_sample": 20}))


@pytest.mark.parametrize("name", TASKS)
def test_command_writes_and_audits(name, tmp_path, capsys):
    task, out = TASKS[name], tmp_path / "samples.jsonl"
    main([name, "--num_samples=60", "--seed=2", "--split=test", f"--out={out}", "--audit"])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    samples = list(task.samples(60, task.options(), seed=2, split="test"))
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert len({row["id"] for row in rows}) == 60
    assert [row["answer"] for row in rows] == [sample.answer for sample in samples]
    assert "majority" in printed
    if task.audit is None:
        table = {line[:16].strip(): line[16:].split() for line in printed.splitlines()}
        for guess, given in task.shortcuts(samples, task.options()).items():
            right = sum(a == str(s.answer) for a, s in zip(given, samples, strict=True))
            assert table[guess][0] == f"{right / 60:.3f}"


def test_audit_by_depth(capsys):
    """One step is right at depth 1 and hardly ever later."""
    main(["modular_exponent", "--num_samples=800", "--statements=7", "--max_depth=3", "--audit"])
    table = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["depth"] == ["all", "1", "2", "3"]
    assert sum(map(int, table["samples"][1:])) == int(table["samples"][0]) == 800
    assert table["one step"][1] == "1.000"
    assert float(table["one step"][3]) < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p_hop", "--num_samples=3"], "nothing to do"),
        (
            ["causal_loop_v2", "--num_samples=3", "--depths=1-x", "--audit"],
            "--depths '1-x' is neither",
        ),
        (["causal_loop_v2", "--num_samples=3", "--families=ring", "--audit"], "families ['ring'] must be"),
        (["modular_exponent", "--num_samples=0", "--audit"], "no samples to audit"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.experiment])
def test_recipe_builds_and_fits_the_experiment(name, tmp_path):
    """The tokenizer has one piece per character and no more, and one document fills a row."""
    task = read_tasks()[0][name]
    overrides = [*task.data, "sources.0.num_samples=600"]
    build(load_recipe(RECIPES / f"{task.recipe}.yaml", overrides), tmp_path, tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.vocab_size == task.vocab_size
    manifest = open_manifest(tmp_path / "out")
    assert manifest.sources[name].labelled
    splits = manifest.sources[name].splits
    documents, tokens = (sum(getattr(s, key) for s in splits.values()) for key in ("documents", "tokens"))
    assert tokens == documents * task.sequence_length
    assert task.kind == "reasoning"
    assert task.evaluation.task == name


def test_a_recorded_task_cannot_be_changed_in_the_file(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("sizes: {small: []}\ntasks: {p_hop: {kind: reasoning}}\n")
    with pytest.raises(ValueError, match="its entry is in data_pipeline/tasks/p_hop.py"):
        read_tasks(path)

"""Every labelled synthetic task and every one with a chain of thought, on a tiny checkpoint."""

from pathlib import Path

import pytest

from data_pipeline.tasks.registry import TASKS
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from eval.looping.answers import EVALUATION_TASKS
from eval.looping.tasks import TASKS as LABELLED
from eval.looping.tasks import chance, task_options
from eval.run import TASKS as RUNNABLE
from eval.thinking.tasks import GENERATED, generated_questions
from model import ZeroModel

from .conftest import tiny_config
from .test_scripts import results_of, samples_of


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has a piece for every character of the tasks."""
    folder = tmp_path_factory.mktemp("spelling") / "export"
    folder.mkdir()
    documents = [
        item.document for task in LABELLED.values() for item in task.generate(200, 0, **task.options).items
    ]
    texts = [document.text + "".join(label for _, label in document.labels) for document in documents]
    characters = "".join(sorted(set("".join("".join(texts).split()))))
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer([characters] * 20, 260 + len(characters), model_type="bpe")
    )
    vocab_size = Tokenizer(folder / "tokenizer.model").vocab_size
    ZeroModel(tiny_config(vocab_size, 256)).save_pretrained(folder)
    return folder


def problem_depths(name: str, seed: int) -> list[int | None]:
    """The depth of each of the 24 test samples that the tests ask for."""
    record = TASKS[name]
    assert record.evaluation is not None
    options = record.test_options(**LABELLED[name].options)
    return [record.evaluation.depth(sample) for sample in record.test_samples(24, seed, options)]


def test_tables_derive_from_the_records():
    assert set(LABELLED) == {name for name, task in TASKS.items() if task.labelled}
    assert set(LABELLED) <= set(RUNNABLE)
    assert set(GENERATED) == {name for name, task in TASKS.items() if task.traced and task.evaluation}
    assert RUNNABLE["p_hop"] is EVALUATION_TASKS["p_hop"]  # its script exports the same record
    for name, task in LABELLED.items():
        assert all(isinstance(value, int) for value in task.options.values())
        assert task_options(name, "") == task.options
        assert 0 < chance(name, task.options) < 1


@pytest.mark.parametrize("name", LABELLED)
def test_run_scores_the_answers(name, spelling, tmp_path, run_script):
    run_script(
        "run.py", "--checkpoint", spelling, "--tasks", name, "--limit", 24, "--seed", 3,
        "--output_path", tmp_path, "--log_samples",
    )  # fmt: skip
    results = results_of(tmp_path)
    data = LABELLED[name].generate(24, 3, **LABELLED[name].options)
    lines = samples_of(tmp_path, name)
    assert [line["doc_id"] for line in lines] == [item.id for item in data.items]
    assert [line["target"] for line in lines] == [item.document.labels[-1][1] for item in data.items]
    right = [line["acc"] for line in lines]
    assert results["results"][name]["acc,none"] == pytest.approx(sum(right) / 24)
    baselines = results["baselines"][name]
    assert baselines["chance"]["value"] == chance(name, LABELLED[name].options)
    assert set(baselines) == {"chance", "majority", *data.guesses}
    each = problem_depths(name, 3)
    assert [line["problem_depth"] for line in lines] == each
    depths = set(each) - {None}
    parts = {f"{name}_problem_depth{depth}" for depth in depths}
    assert set(results["results"]) == {name, *parts}
    for depth in depths:
        chosen = [i for i, own in enumerate(each) if own == depth]
        score = results["results"][f"{name}_problem_depth{depth}"]["acc,none"]
        assert score == pytest.approx(sum(right[i] for i in chosen) / len(chosen))


@pytest.mark.parametrize("name", LABELLED)
def test_reasoning_measures_every_depth(name, spelling, tmp_path, run_script):
    run_script(
        "reasoning.py", "--checkpoint", spelling, "--task", name, "--num_samples", 24, "--num_steps", "1,2",
        "--output_path", tmp_path,
    )  # fmt: skip
    results = results_of(tmp_path)["results"]
    task = f"reasoning_{name}"
    assert {"acc,num_steps=1", "acc,num_steps=2"} <= set(results[task])
    depths = set(problem_depths(name, 1234)) - {None}
    assert set(results) == {task, f"{task}_labels", *(f"{task}_problem_depth{depth}" for depth in depths)}


@pytest.mark.parametrize("name", LABELLED)
def test_problems_of_chosen_depths_are_those_among_all(name):
    task, options = LABELLED[name], LABELLED[name].options
    whole = task.generate(40, 3, **options)
    known = {item.problem_depth for item in whole.items} - {None}
    wrong = max(known, default=0) + 1
    with pytest.raises(ValueError, match=rf"--problem_depth {wrong}: no sample of {name} has it"):
        task.generate(40, 3, [*known, wrong], **options)
    for depth in known:
        some = task.generate(40, 3, [depth], **options)
        chosen = [i for i, item in enumerate(whole.items) if item.problem_depth == depth]
        assert some.items == [whole.items[i] for i in chosen]
        for way, guesses in some.guesses.items():
            assert guesses == [whole.guesses[way][i] for i in chosen]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_questions_have_the_answers_of_the_samples(name):
    record, options = TASKS[name], LABELLED[name].options
    data = generated_questions(name, 12, 3, options)
    samples = record.test_samples(12, 3, record.test_options(**options))
    assert [question.answer for question in data.questions] == [str(sample.answer) for sample in samples]
    assert data.chance == chance(name, options)
    assert set(data.guesses) == set(record.shortcuts(samples, record.test_options(**options)))

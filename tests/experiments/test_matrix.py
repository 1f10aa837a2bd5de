"""What a matrix plans and refuses, before anything runs."""

import json
import math
from pathlib import Path

import pytest
import yaml

from data_pipeline.build import build
from data_pipeline.recipe import load_recipe
from experiments.cells import evaluations, training
from experiments.groups import GROUPS, PAIRS, Pair, measured, unequal
from experiments.jobs import keep_settings
from experiments.matrix import Matrix, PlannedCell, read_matrix
from experiments.matrix_file import MATRICES, find_matrix
from experiments.run import choose_rates, jobs_of, select, write_rates
from experiments.settings import cell_settings
from experiments.tasks import read_tasks
from model import ModelConfig
from pretrain.run_config import load_run_config

from ..conftest import ROOT

SHIPPED = sorted(
    path
    for path in (ROOT / "experiments/matrices").glob("*.yaml")
    if not path.name.startswith(("latent_cot", "retrofit"))  # test_latent_cot.py, test_retrofit.py
)
BLOCKS = (ROOT / "experiments/CLAIMS.md").read_text().split("```yaml\n")[1:]
# Groups that pretrain/configs/groups/ alone has.
IN_NO_MATRIX = {
    *("gqa", "gated", "gated_act", "gated_dense_params", "gated_dense_flops", "ut_normed", "ut_normed_act")
}
CLAIMS = [yaml.safe_load(block.split("```")[0]) for block in BLOCKS]


def write(folder: Path, rates: object = (0.002,), **part: object) -> Path:
    """A matrix of one part."""
    values = {"tasks": ["p_hop"], "groups": ["loop"], "seeds": [0], "budgets": [{"steps": 10}], **part}
    path = folder / "matrix.yaml"
    given = list(rates) if isinstance(rates, tuple) else rates
    path.write_text(json.dumps({"learning_rates": given, "parts": [values]}))
    return path


def plans(folder: Path, **part: object) -> dict[str, PlannedCell]:
    return {plan.cell.group: plan for plan in read_matrix(write(folder, **part)).plans}


def shipped(path: Path, folder: Path) -> Matrix:
    """A shipped matrix, whose learning rates need not be there yet."""
    values = yaml.safe_load(path.read_text())
    values.setdefault("learning_rates", [0.001])
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(values))
    return read_matrix(copy)


def test_the_tokenizers_have_as_many_pieces_as_the_tasks_say(tmp_path):
    """On which what is equal in parameters depends; of text it is the recipe's."""
    for name, task in read_tasks()[0].items():
        recipe = ROOT / f"data_pipeline/recipes/{task.recipe}.yaml"
        if task.kind == "text":
            assert load_recipe(recipe, task.data).tokenizer.vocab_size == task.vocab_size
            continue
        few = load_recipe(recipe, [*task.data, "sources.0.num_samples=60"])
        manifest = build(few, tmp_path, tmp_path / name)
        assert manifest is not None
        assert manifest.vocab_size == task.vocab_size, name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_matrix_plans_and_its_pairs_are_equal(path, tmp_path):
    found = shipped(path, tmp_path).plans
    assert len({plan.cell.name for plan in found}) == len(found) > 0


def test_what_is_trained_is_the_planned_model(tmp_path):
    """As pretrain/main.py reads the overrides: of every group once, and of every key that a study varies."""
    paths = (MATRICES / "standard.yaml", MATRICES / "loss_weights.yaml")
    found = {
        (plan.cell.group, plan.cell.vary and plan.cell.vary[0]): plan
        for path in paths
        for plan in shipped(path, tmp_path).plans
    }
    assert len(found) == len(GROUPS) - len(IN_NO_MATRIX) + 3
    for plan in found.values():
        config = load_run_config(str(ROOT / "experiments/base.yaml"), [*plan.overrides, "data.path=x"])
        model = {key: value for key, value in config.model.items() if key != "distillation"}
        assert ModelConfig.from_dict(model) == plan.model, plan.cell.name
        assert config.max_steps == config.eval_every == plan.max_steps
        assert config.seed == plan.cell.seed


def test_the_matrices_are_of_the_promised_sizes(tmp_path):
    quick = [plan.cell for plan in shipped(MATRICES / "quick.yaml", tmp_path).plans]
    for task in (two := {cell.task for cell in quick}):
        own = [cell for cell in quick if cell.task == task]
        assert len({cell.group for cell in own}) <= 6
        assert len({cell.seed for cell in own}) == 3
    assert len(two) == 2
    standard = [plan.cell for plan in shipped(MATRICES / "standard.yaml", tmp_path).plans]
    assert {cell.group for cell in standard} == set(GROUPS) - IN_NO_MATRIX
    swept = {(plan.cell.task, plan.cell.group) for plan in shipped(MATRICES / "sweep.yaml", tmp_path).plans}
    names = ("examples", "iterations", "loss_weights", "names")
    studies = [shipped(MATRICES / f"{name}.yaml", tmp_path) for name in names]
    small = [*quick, *standard, *(plan.cell for study in studies for plan in study.plans)]
    tasks = read_tasks()[0]
    assert {(tasks[cell.task].learning_rates_of or cell.task, cell.group) for cell in small} <= swept
    for group in ("loop", "dense_params", "dense_narrow", "dense_flops"):
        assert {cell.seed for cell in standard if (cell.task, cell.group) == ("p_hop", group)} == {
            0,
            1,
            2,
            3,
            4,
        }


def test_a_task_may_take_the_learning_rates_of_another(tmp_path):
    chosen = yaml.safe_load((ROOT / "experiments/learning_rates.yaml").read_text())["causal_loop_v2/small"]
    found = read_matrix(MATRICES / "names.yaml").plans
    assert {plan.cell.task for plan in found} == {"causal_loop_v2_held_out"}
    assert all(plan.cell.learning_rate == chosen[plan.cell.group] for plan in found)
    tasks = yaml.safe_load((ROOT / "experiments/tasks.yaml").read_text())
    tasks["tasks"]["causal_loop_v2_held_out"]["learning_rates_of"] = "causal_lop"
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    with pytest.raises(
        ValueError, match="learning_rates_of 'causal_lop' is not a task; choose from .*causal_loop_v2,"
    ):
        read_tasks(tmp_path / "tasks.yaml")


def test_every_claim_is_about_groups_tasks_and_pairs_that_there_are(tmp_path):
    tasks, _ = read_tasks()
    runs: set[tuple[str, str]] = set()
    for name in ("standard", "full"):
        found = shipped(MATRICES / f"{name}.yaml", tmp_path).plans
        runs |= {(plan.cell.task, plan.cell.group) for plan in found}
    declared = {(frozenset((pair.a, pair.b)), pair.equal): pair.tolerance for pair in PAIRS}
    assert len({claim["id"] for claim in CLAIMS}) == len(CLAIMS) == 11
    for claim in CLAIMS:
        groups = {claim[side]["group"] for side in "ab" if side in claim}
        assert groups <= set(GROUPS)
        for task in claim["tasks"]:
            steps = tasks[task].evaluation.steps
            R = tasks[task].steps
            for side in (claim[s] for s in "ab" if s in claim):
                assert {"trained": R, "2R": 2 * R}.get(side["steps"], side["steps"]) in {*steps, R}
                if "halting" not in claim["id"] and task != "causal_loop_v2_deep":
                    assert (task, side["group"]) in runs, claim["id"]
        if len(groups) == 2 and "extrapolation" not in claim["id"]:
            assert declared[frozenset(groups), claim["equal"]] == claim["tolerance"], claim["id"]


def test_an_unequal_pair_is_refused_in_one_line(tmp_path, monkeypatch):
    pair = Pair("loop", "mla", "inference_flops", 0.02)
    monkeypatch.setattr("experiments.matrix.PAIRS", (pair,))
    with pytest.raises(
        ValueError, match=r"p_hop, size small, budget 10: loop has inference_flops 4.*tolerance"
    ):
        read_matrix(write(tmp_path, groups=["loop", "mla"]))


@pytest.mark.parametrize(("b", "fits"), [(100.0, True), (99.0, True), (98.9, False), (101.2, False)])
def test_the_tolerance_is_a_share_of_the_larger_side(b, fits):
    assert (unequal(Pair("loop", "mla", "parameters", 0.01), 100.0, b) is None) == fits


def test_the_flops_of_a_budget_are_those_of_its_group(tmp_path):
    budget = {"steps": 300, "training_flops_of": "loop"}
    found = plans(tmp_path, groups=["loop", "dense_params", "dense_flops", "adaptive"], budgets=[budget])
    assert found["loop"].max_steps == 300
    flops = {
        name: measured("training_flops", plan.model, plan.task.sequence_length, plan.max_steps)
        for name, plan in found.items()
    }
    assert flops == pytest.approx(dict.fromkeys(flops, flops["loop"]), rel=1 / 300)
    assert found["dense_params"].max_steps > 900  # a layer in place of four, and the embedding
    assert found["adaptive"].max_steps < 250  # it reads every step out


def test_a_study_varies_one_thing_and_keeps_the_rest(tmp_path):
    weight = "model.recurrence.halting.ponder_weight"
    vary = {"steps": [2, 8], "examples": [1000], weight: [0.5]}
    found = {
        plan.cell.name.split("/")[3]: plan
        for plan in read_matrix(write(tmp_path, groups=["adaptive"], vary=vary)).plans
    }
    names = [f"adaptive@{key}@lr=0.002" for key in ("steps=2", "steps=8", "examples=1000", f"{weight}=0.5")]
    assert list(found) == names
    two, eight, few, heavy = found.values()
    assert (two.model.recurrence.num_steps, eight.model.recurrence.num_steps) == (2, 8)
    assert few.data == ("sources.0.num_samples=1000",)
    assert (few.data_name, two.data_name) == ("p_hop-1000", "p_hop-120000")
    assert heavy.model.recurrence.halting.ponder_weight == 0.5
    assert few.model.recurrence.halting.ponder_weight is None


@pytest.mark.parametrize(
    ("part", "rates", "message"),
    [
        ({"groups": ["lop"]}, (0.1,), "unknown group 'lop'; did you mean 'loop'?"),
        ({"tasks": ["phop"]}, (0.1,), "unknown task 'phop'; did you mean 'p_hop'?"),
        ({"sizes": ["tiny"]}, (0.1,), "unknown size 'tiny'"),
        ({"group": ["loop"]}, (0.1,), "parts[0].group is not a known key; did you mean 'groups'?"),
        ({}, "tests/experiments/rates.yaml", None),
        ({"groups": ["ut"]}, "tests/experiments/rates.yaml", "group ut has no learning rate for p_hop/small"),
        (
            {"learning_rates": [0.1]},
            "tests/experiments/rates.yaml",
            "learning_rates [0.1] of a part are for a sweep; remove them",
        ),
        ({}, "no/such.yaml", "no/such.yaml does not exist; run --matrix sweep"),
        ({"tasks": ["causal_loop_v2"], "groups": ["pause"]}, (0.1,), "does not go with embedding_mixing=4"),
    ],
)
def test_a_mistake_in_a_matrix_is_one_line(part, rates, message, tmp_path):
    path = write(tmp_path, rates, **part)
    if message is None:
        assert read_matrix(path).plans[0].cell.learning_rate == 0.002
        return
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_matrix(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cell_is_told_what_its_name_says(tmp_path):
    matrix = read_matrix(write(tmp_path, groups=["random", "dense_params"], seeds=[7]))
    looped, dense = matrix.plans
    told = training(looped)
    assert {"seed=7", "max_steps=10", "optimizer.lr=0.002", "model.recurrence.max_steps=8"} <= set(told)
    tests = evaluations(cell_settings(looped, evaluate=True))
    assert tests["main"][tests["main"].index("--num_steps") + 1] == "1,2,4,8,12,16,24"
    assert tests["gap twice as long"][-3:] == ["length=48", "--num_steps", "4"]
    assert "--num_steps" not in evaluations(cell_settings(dense, evaluate=True))["main"]
    name = "p_hop/small/10/random@lr=0.002/7"
    assert [job.name for job in select(jobs_of(matrix), name)] == [name]


def test_a_matrix_is_named_by_a_path_or_by_its_name(tmp_path):
    path = write(tmp_path)
    assert find_matrix(str(path)) == path
    assert find_matrix("quick") == MATRICES / "quick.yaml"
    for given in ("experiments/quick.yaml", "experiments/studies/quick.yaml", "quikc"):  # two old places
        with pytest.raises(FileNotFoundError, match="name in experiments/matrices; did you mean 'quick'"):
            find_matrix(given)
    with pytest.raises(FileNotFoundError, match=r"known: examples, full, .*standard"):
        find_matrix("xyz")


def test_a_folder_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "cell" / "settings.json"
    keep_settings(path, {"training": ["a=1", "b=2"]})
    keep_settings(path, {"training": ["a=1", "b=2"]})
    with pytest.raises(ValueError, match="training b=2, but b=3 is asked for; give another --out"):
        keep_settings(path, {"training": ["a=1", "b=3"]})


def test_a_cell_keeps_its_settings_rather_than_its_command_lines(tmp_path):
    """So that a renamed script or flag refuses no run folder; read back, they are the same."""
    matrix = read_matrix(MATRICES / "quick.yaml")
    for job, plan in zip(jobs_of(matrix), matrix.plans, strict=True):
        assert job.settings == cell_settings(plan, evaluate=True)
        keep_settings(tmp_path / job.name / "settings.json", job.settings)
        keep_settings(tmp_path / job.name / "settings.json", job.settings)
    changed = json.loads(json.dumps(job.settings))
    changed["training"]["overrides"]["seed"] = 9
    with pytest.raises(ValueError, match="was made with training overrides seed 2, but 9 is asked for"):
        keep_settings(tmp_path / job.name / "settings.json", changed)


def test_the_sweep_takes_the_lowest_mean_loss_of_complete_groups_and_keeps_other_rates(tmp_path):
    record = json.loads((ROOT / "tests/experiments/cells/p_hop_synthetic.json").read_text())[0]
    groups = ["loop", "mla", "ut", "plain"]
    matrix = read_matrix(write(tmp_path, (0.1, 0.2), groups=groups, seeds=[0, 1]))
    losses = {
        "ut@lr=0.1": [math.nan, 1.0],  # diverged
        "ut@lr=0.2": [7.0, 7.0],
        "plain@lr=0.1": [math.nan, 1.0],
        "plain@lr=0.2": [math.inf, 1.0],
        "loop@lr=0.1": [1.0, 4.0],
        "loop@lr=0.2": [2.0, 2.0],
        "mla@lr=0.1": [1.0, 1.0],
        "mla@lr=0.2": [5.0],
    }
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            folder = tmp_path / "cells/p_hop/small/10" / name / str(seed)
            folder.mkdir(parents=True)
            (folder / "cell.json").write_text(json.dumps({**record, "validation_loss": loss}))
    chosen = choose_rates(matrix.plans, tmp_path)
    assert chosen == {"p_hop/small": {"loop": 0.2, "ut": 0.2}}  # a cell of mla is missing
    rates = tmp_path / "rates.yaml"
    write_rates({"p_hop/small": {"kv": 0.3, "loop": 0.9}, "addition/small": {"ut": 0.1}}, rates)
    write_rates(chosen, rates)
    assert yaml.safe_load(rates.read_text()) == {
        "p_hop/small": {"kv": 0.3, "loop": 0.2, "ut": 0.2},
        "addition/small": {"ut": 0.1},
    }

"""The matrix of methods: which cells, in which order, what is kept, what a failure costs, what is read."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.matrix import Cell, evaluations, keep_settings, plan, training, write_results
from distill.matrix_tasks import TASKS
from distill.methods import METHODS
from experiments.jobs import call, run_all, train

from ..conftest import ROOT
from ..eval.test_report_thoughts import OWN, run_folder
from ..eval.test_report_thoughts import write_results as store

LOOPS = TASKS["causal_loop_v2"]
FULL, QUICK = LOOPS.full, LOOPS.quick
PICTURES = ("accuracy_by_depth", "accuracy_by_passes", "accuracy_by_iterations", "cache_budget")


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


# ---- planning


def test_the_whole_has_every_method_and_three_seeds_of_those_that_a_claim_needs():
    cells = plan(FULL.methods, FULL.seeds)
    assert {cell.method for cell in cells} == {*METHODS, "teacher"}
    assert names(cells)[:3] == ["teacher-0", "teacher-1", "teacher-2"]
    several = {"teacher", "cot", "no_cot", "kava", "lotus", "no_distillation"}
    for method in (*METHODS, "teacher"):
        seeds = [cell.seed for cell in cells if cell.method == method]
        assert seeds == ([0, 1, 2] if method in several else [0]), method
    assert len(set(names(cells))) == len(cells) == 24


def test_only_the_teachers_that_have_students_are_trained():
    assert names(plan(["codi"], [4, 7])) == ["teacher-4", "codi-4"]
    assert names(plan(["codi", "kava"], [4, 7])) == ["teacher-4", "teacher-7", "codi-4", "kava-4", "kava-7"]
    assert {cell.teacher for cell in plan(QUICK.methods, QUICK.seeds)} == {None, "teacher-0"}


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [(["kaava"], [0], "'kaava' is unknown; choose from cot"), (["kava", "kava"], [0], "none of them twice")],
)
def test_a_wrong_choice_is_refused_in_one_line(methods, seeds, message):
    with pytest.raises(ValueError, match=message):
        plan(methods, seeds)


def test_a_student_starts_from_its_seeds_teacher_and_takes_its_own_steps(tmp_path):
    given = training(Cell("lotus", 2), LOOPS, FULL, tmp_path, ["x=1"])
    assert given[given.index("--init") + 1] == str(tmp_path / "teacher-2" / "export")
    assert {f"max_steps={FULL.student_steps}", "seed=2", "model.distillation.method=lotus"} <= set(given)
    assert "model.distillation.latent_block=11" in given
    assert given[-1] == "x=1"  # what the user sets goes over what the matrix does
    teacher = training(Cell("teacher", 2), LOOPS, FULL, tmp_path, [])
    assert "--init" not in teacher
    assert {f"max_steps={FULL.teacher_steps}", "model.distillation.method=cot"} <= set(teacher)


def test_every_method_is_tested_as_it_is_and_thoughts_with_their_controls():
    for method in METHODS:
        found = evaluations(method, LOOPS)
        latent = METHODS[method].latent_cot["num_latents"] > 0
        assert ({"shuffled", "zeroed"} <= set(found)) == latent, method
        assert ("budget" in found) == (method == "cot")
        if METHODS[method].latent_cot.get("feedback") in ("jacobi", "lotus"):
            own = str(METHODS[method].latent_cot["num_iterations"])
            assert own in found["own"][1].split(","), method


def test_a_folder_keeps_its_settings(tmp_path):
    keep_settings(tmp_path, {"student_steps": 5, "overrides": []})
    keep_settings(tmp_path, {"student_steps": 5, "overrides": []})
    with pytest.raises(ValueError, match="student_steps=5, but student_steps=6 is asked for"):
        keep_settings(tmp_path, {"student_steps": 6, "overrides": []})


# ---- pieces of work


def test_a_failure_costs_what_needs_it_and_nothing_else():
    done = []

    def fail() -> None:
        raise ValueError("see a.log")

    work = {"a": fail, "b": lambda: done.append("b"), "c": lambda: done.append("c"), "d": fail}
    failed = run_all(work, 2, after={"b": "a", "c": "b"} | {"d": "a"})
    assert failed == {
        "a": "see a.log",
        "b": "needs a, which failed",
        "c": "needs b, which failed",
        "d": "needs a, which failed",
    }
    assert run_all(work, 1, after={"c": "b"}) == {"a": "see a.log", "d": "see a.log"}
    assert done == ["b", "c"]


def test_two_pieces_run_at_once_and_none_before_what_it_needs():
    both, order = threading.Barrier(2, timeout=20), []

    def piece(name: str) -> None:
        if name in ("a", "b"):
            both.wait()
        order.append(name)

    work = {name: (lambda name=name: piece(name)) for name in ("a", "b", "c")}
    assert run_all(work, 2, after={"c": "b"}) == {}
    assert order.index("c") > order.index("b")


def test_a_command_that_fails_names_its_log_and_a_finished_run_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"data_pipeline failed with code \d+: see .*a\.log"):
        call(tmp_path / "a.log", sys.executable, "data_pipeline")
    assert (tmp_path / "a.log").read_text()
    (tmp_path / "DONE").touch()
    train(tmp_path, "no_such_script.py")
    assert not (tmp_path / "train.log").exists()


# ---- collecting


def test_stored_results_are_collected_those_of_failed_cells_too(tmp_path):
    """Two seeds of kava, of which one failed after an evaluation; a cell that failed before any."""
    folders = [run_folder(tmp_path, name) for name in ("kava-0", "kava-1", "lotus-0")]
    for run, accuracy in zip(folders, (0.25, 0.75), strict=False):
        store(run, {OWN: [accuracy, 1.0, 0.5]})
    settings = {
        "task": "causal_loop_v2",
        "num_documents": 9,
        "teacher_steps": 70,
        "student_steps": 30,
        "jobs": 2,
    }
    failed = {"kava-1": "see a.log", "lotus-0": "see b.log"}
    write_results(tmp_path, folders, settings, failed)
    report = json.loads((tmp_path / "results.json").read_text())
    assert (report["settings"], report["failed"]) == (settings, failed)
    (way,) = report["arms"]["kava"]["ways"]
    assert [run["score"][0] for run in way["runs"]] == [0.25, 0.75]
    assert [run["by_depth"] for run in way["runs"]] == [{"1": [1.0, 0.01], "2": [0.5, 0.01]}] * 2
    text = (tmp_path / "table.md").read_text()
    assert "teachers 70 steps, then every method 30." in text
    assert "0.500 ± 0.250" in text
    assert text.endswith("\nFailed: kava-1: see a.log\n\nFailed: lotus-0: see b.log\n")
    with pytest.raises(ValueError, match="no cell was evaluated: lotus-0: see b.log"):
        write_results(tmp_path, folders[2:], settings, {"lotus-0": "see b.log"})


# ---- all of it


def matrix(capfd, out: Path, *more: str) -> tuple[int, str]:
    """Exit code and output of the command, at its smallest."""
    sizes = ["--num_documents", "300", "--teacher_steps", "2", "--student_steps", "1", "--num_questions", "6"]
    tiny = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"]
    tiny += ["global_batch_size=2", "micro_batch_size=2"]
    tiny += ["optimizer.warmup_steps=1", "optimizer.schedule=cosine"]
    command = [sys.executable, "distill/matrix.py", "--out", out, "--seeds", "3", *sizes, *tiny, *more]
    code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def files(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.glob("*-3/**/*") if path.is_file()}


@pytest.mark.slow
def test_the_smallest_matrix_end_to_end(tmp_path, capfd):
    """Two methods from one teacher; one of them fails at first; what is there is kept; a page over it."""
    out = tmp_path / "matrix"
    (out / "pccot-3").mkdir(parents=True)
    (out / "pccot-3" / "config.yaml").mkdir()  # in the way of the run's own
    code, said = matrix(capfd, out, "--methods", "cot,pccot")
    assert code == 1, said
    assert f"pccot-3: main.py failed with code 2: see {out / 'pccot-3' / 'train.log'}" in said
    report = json.loads((out / "results.json").read_text())
    assert set(report["failed"]) == {"pccot-3"}
    assert set(report["arms"]) == {"teacher", "cot"}
    (out / "pccot-3" / "config.yaml").rmdir()
    before = files(out)
    code, said = matrix(capfd, out, "--methods", "cot,pccot")
    assert code == 0, said
    after = files(out)
    kept = [path for path in before if "pccot-3" not in path]
    assert len(kept) > 10
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}

    report = json.loads((out / "results.json").read_text())
    assert report["failed"] == {}
    ways = {name: arm["ways"] for name, arm in report["arms"].items()}
    assert [way["kv_budget"] for way in ways["cot"]] == [None, 12, 16, 24, 32]
    assert [way["replace"] for way in ways["pccot"]] == [None] * 6 + ["shuffled", "zeroed"]
    assert [way["num_iterations"] for way in ways["pccot"]] == [0, 1, 2, 3, 6, 12, 3, 3]
    assert report["arms"]["pccot"]["own"]["num_iterations"] == 3
    (measured,) = ways["pccot"][0]["runs"]
    assert sorted(measured["by_depth"]) == ["1", "2", "3"]
    assert measured["num_questions"] == 6
    for way in ways["pccot"][1:6]:  # the question, iteration 0, the others, <eot>, and what was written
        passes = way["runs"][0]["costs"]["forward_passes,none"]
        assert passes >= 1 + 1 + way["num_iterations"] + 1
    assert "| pccot   | 1     | 6 | 1 steps, 284 tokens" in (out / "table.md").read_text()
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in PICTURES)
    # The tokenizer has a piece for each character and no merged ones.
    assert Tokenizer(out / "data" / "tokenizer.model").vocab_size == 287
    page = tmp_path / "report.html"
    command = [sys.executable, "eval/report.py", *map(str, out.glob("*-3")), "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "<h2>Latent chain of thought</h2>" in page.read_text()
    code, said = matrix(capfd, out, "--methods", "cot", "--student_steps", "9")
    assert code == 2
    assert said.splitlines() == [
        f"error: --out {out} holds runs with student_steps=1, but student_steps=9 is asked for; give another "
        "folder"
    ]

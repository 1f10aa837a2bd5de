"""A matrix of methods of latent chain of thought: its cells, their order, resuming, failures, results."""

import json
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.methods import METHODS
from experiments.jobs import Data, Job, call, run_all, run_job, train
from experiments.latent_cot import LatentCotCell, read_latent_cot
from experiments.matrix_file import MATRICES
from experiments.reporting.latent_cot import write_results
from experiments.run import jobs_of, read, select, with_teachers

from ..conftest import ROOT
from ..eval.test_report_thoughts import OWN, run_folder
from ..eval.test_report_thoughts import write_results as store

SHIPPED = [MATRICES / f"{name}.yaml" for name in ("latent_cot", "latent_cot_quick", "latent_cot_gsm8k")]
TINY = ROOT / "tests/experiments/tiny_latent_cot.yaml"
PICTURES = ("accuracy_by_depth", "accuracy_by_passes", "accuracy_by_iterations", "cache_budget")


def write(folder: Path, parts: list[dict[str, Any]] | None = None, **changes: object) -> Path:
    """The tiny matrix with other parts and values."""
    values = {**yaml.safe_load(TINY.read_text()), **changes}
    values["parts"] = values["parts"] if parts is None else parts
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def planned(folder: Path, *parts: tuple[list[str], list[int]]) -> list[str]:
    given = [{"methods": methods, "seeds": seeds} for methods, seeds in parts]
    return names(read_latent_cot(write(folder, given)).cells)


def names(cells: list[LatentCotCell]) -> list[str]:
    return [cell.name for cell in cells]


# ---- planning


def test_the_full_matrix_has_every_method_and_three_seeds_of_the_repeated_ones():
    cells = read_latent_cot(SHIPPED[0]).cells
    assert {cell.method for cell in cells} == {*METHODS, "teacher"}
    assert names(cells)[:3] == ["teacher-0", "teacher-1", "teacher-2"]
    several = {"teacher", "cot", "no_cot", "kava", "lotus", "no_distillation"}
    for method in (*METHODS, "teacher"):
        seeds = [cell.seed for cell in cells if cell.method == method]
        assert seeds == ([0, 1, 2] if method in several else [0]), method
    assert len(set(names(cells))) == len(cells) == 24


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_student_of_a_shipped_matrix_has_its_teacher_before_it(path):
    jobs = jobs_of(read(path))
    for number, job in enumerate(jobs):
        assert job.teacher is None or job.teacher in [earlier.name for earlier in jobs[:number]]
    assert len({job.name for job in jobs}) == len(jobs) > 5


def test_only_the_teachers_that_have_students_are_trained_and_each_once(tmp_path):
    assert planned(tmp_path, (["codi"], [4])) == ["teacher-4", "codi-4"]
    found = planned(tmp_path, (["codi", "kava"], [4]), (["kava"], [7, 4]))
    assert found == ["teacher-4", "teacher-7", "codi-4", "kava-4", "kava-7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"methods": ["kavaa"], "seeds": [0]}]}, "unknown method 'kavaa'; did you mean 'kava'?"),
        ({"parts": [{"methods": [], "seeds": [0]}]}, "parts name no cells: give one or more methods"),
        ({"latent_cot": "causal_loop"}, "unknown task 'causal_loop'; did you mean 'causal_loop_v2'?"),
        ({"student_steps": 0}, "student_steps 0 must be at least 1"),
        ({"method": ["kava"]}, "method is not a known key"),
    ],
)
def test_a_mistake_in_a_matrix_is_one_line(changes, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_student_starts_from_its_seeds_teacher_and_takes_its_own_steps():
    matrix = read_latent_cot(SHIPPED[0])
    student, teacher = matrix.job(LatentCotCell("lotus", 2)), matrix.job(LatentCotCell("teacher", 2))
    assert (student.teacher, teacher.teacher) == ("teacher-2", None)
    assert {"max_steps=1200", "save_every=1200", "seed=2"} <= set(student.training)
    assert {"model.distillation.method=lotus", "optimizer.lr=1e-3"} <= set(student.training)
    assert "model.distillation.latent_block=11" in student.training
    assert {"max_steps=1800", "model.distillation.method=cot"} <= set(teacher.training)
    assert "optimizer.lr=1e-3" not in teacher.training
    assert student.data == teacher.data


def test_what_the_matrix_sets_overrides_what_the_task_and_the_method_set(tmp_path):
    (_, student) = read_latent_cot(
        write(tmp_path, [{"methods": ["pause"], "seeds": [0]}], training=["x=1"])
    ).cells
    given = read_latent_cot(tmp_path / "matrix.yaml").training(student)
    assert given[-2:] == ["model.latent_cot.num_latents=24", "x=1"]


def test_the_choice_of_a_student_brings_its_teacher():
    jobs = jobs_of(read(SHIPPED[0]))
    assert [job.name for job in with_teachers(select(jobs, "kava-[12]"), jobs)] == [
        "teacher-1",
        "teacher-2",
        "kava-1",
        "kava-2",
    ]
    (last,) = select(jobs, "kava-*", index=2)
    assert [job.name for job in with_teachers([last], jobs)] == ["teacher-2", "kava-2"]


def test_every_method_is_tested_as_it_is_and_thoughts_with_their_controls():
    matrix = read_latent_cot(SHIPPED[0])
    for method in METHODS:
        found = matrix.evaluations(method)
        latent = METHODS[method].latent_cot["num_latents"] > 0
        assert ({"shuffled", "zeroed"} <= set(found)) == latent, method
        assert ("budget" in found) == (method == "cot")
        if METHODS[method].latent_cot.get("feedback") in ("jacobi", "lotus"):
            flags = found["own"]
            own = str(METHODS[method].latent_cot["num_iterations"])
            assert own in flags[flags.index("--num_iterations") + 1].split(","), method


def test_questions_are_generated_or_the_first_of_a_file():
    generated, published = (read_latent_cot(path).evaluations("no_cot")["own"] for path in SHIPPED[1:])
    assert generated[1:7] == [
        *("--task", "causal_loop_v2", "--task_options", "variables=3,statements=3,names=5,max_depth=3"),
        *("--num_samples", "300"),
    ]
    assert published[1:5] == ["--task", "gsm8k", "--limit", "1319"]


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


def test_two_processes_that_want_the_same_cell_train_it_once(tmp_path):
    """As two students of one teacher in a SLURM array; a lock is per open file, so two threads show it."""
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[-1].removeprefix('output_dir='))\n"
        "(out / 'trained').open('a').write('once')\n"
        "time.sleep(0.5)\n"
        "(out / 'DONE').touch()\n"
    )
    (tmp_path / "data/d").mkdir(parents=True)
    (tmp_path / "data/d/manifest.json").touch()
    job = Job("teacher-0", 1, str(script), (), Data("d", "none", ()), {})
    assert run_all({name: partial(run_job, job, tmp_path) for name in ("a", "b")}, 2) == {}
    assert (tmp_path / "cells/teacher-0/trained").read_text() == "once"


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
    for name, accuracy in (("kava-0", 0.25), ("kava-1", 0.75), ("lotus-0", None)):
        run = run_folder(tmp_path / "cells", name)
        if accuracy is not None:
            store(run, {OWN: [accuracy, 1.0, 0.5]})
    parts = [{"methods": ["kava"], "seeds": [0, 1]}, {"methods": ["lotus"], "seeds": [0]}]
    matrix = read_latent_cot(write(tmp_path, parts, teacher_steps=70, student_steps=30, training=[]))
    failed = {"kava-1": "see a.log", "lotus-0": "see b.log"}
    write_results(matrix, tmp_path, 2, failed)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["failed"] == failed
    assert report["settings"] == {
        "task": "causal_loop_v2",
        "num_documents": 300,
        "teacher_steps": 70,
        "student_steps": 30,
        "overrides": [],
        "jobs": 2,
    }
    (way,) = report["arms"]["kava"]["ways"]
    assert [run["score"][0] for run in way["runs"]] == [0.25, 0.75]
    assert [run["by_depth"] for run in way["runs"]] == [{"1": [1.0, 0.01], "2": [0.5, 0.01]}] * 2
    text = (tmp_path / "table.md").read_text()
    assert "teachers 70 steps, then every method 30." in text
    assert "0.500 ± 0.250" in text
    assert text.endswith("\nFailed: kava-1: see a.log\n\nFailed: lotus-0: see b.log\n")
    with pytest.raises(ValueError, match="no cell was evaluated: lotus-0: see b.log"):
        write_results(matrix, tmp_path / "empty", 1, {"lotus-0": "see b.log"})


# ---- all of it


def matrix(capfd, out: Path, *more: str, path: Path = TINY) -> tuple[int, str]:
    """Exit code and output of the command, at its smallest."""
    command = [sys.executable, "experiments/run.py", "--matrix", path, "--out", out, "--jobs", "2", *more]
    code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def files(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.glob("cells/**/*") if path.is_file()}


@pytest.mark.slow
def test_the_smallest_matrix_end_to_end(tmp_path, capfd):
    """Two methods from one teacher; one fails at first; finished cells are kept; a page over all."""
    out = tmp_path / "matrix"
    blocked = out / "cells/pccot-3/config.yaml"
    blocked.mkdir(parents=True)  # in the way of the run's own
    code, said = matrix(capfd, out, "--cells", "pccot-*")
    assert code == 1, said
    problem = f"main.py failed with code 2: see {blocked.parent / 'train.log'}"
    assert f"failed: pccot-3: {problem}" in said
    report = json.loads((out / "results.json").read_text())
    assert report["failed"] == {"pccot-3": problem}
    assert set(report["arms"]) == {"teacher"}
    code, said = matrix(capfd, out, "--index", "1")  # as a job of an array: failures of other jobs are kept
    assert code == 0, said
    report = json.loads((out / "results.json").read_text())
    assert report["failed"] == {"pccot-3": problem}
    assert set(report["arms"]) == {"teacher", "cot"}
    blocked.rmdir()
    before = files(out)
    code, said = matrix(capfd, out)
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
    assert Tokenizer(out / "data/causal_loop_v2-300/tokenizer.model").vocab_size == 287
    page = tmp_path / "report.html"
    command = [sys.executable, "eval/report.py", *map(str, out.glob("cells/*-3")), "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "<h2>Latent chain of thought</h2>" in page.read_text()
    longer = write(tmp_path, student_steps=9)
    code, said = matrix(capfd, out, "--cells", "cot-*", path=longer)
    assert code == 1
    folder = out / "cells/cot-3"
    assert f"failed: cot-3: {folder} was made with training max_steps=1, but max_steps=9 is asked for" in said


@pytest.mark.slow
def test_a_cell_whose_teacher_failed_is_left_out_with_that_reason(tmp_path, capfd):
    (tmp_path / "cells/teacher-3/config.yaml").mkdir(parents=True)
    code, said = matrix(capfd, tmp_path, "--cells", "cot-*")
    assert code == 2, said
    assert "failed: cot-3: needs teacher-3, which failed" in said
    assert said.splitlines()[-1].startswith("error: no cell was evaluated: teacher-3: main.py failed")
    assert not (tmp_path / "cells/cot-3").exists()

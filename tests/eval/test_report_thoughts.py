"""What the report makes of the results of eval/thoughts.py: seeds, controls, costs, settings."""

import json
import statistics
from pathlib import Path

import pytest

from common.pages import to_page
from eval.report import build_page
from eval.reports.runs import read_runs
from eval.reports.thoughts import (
    budget_figure,
    depth_table,
    figures,
    methods_table,
    over_seeds,
    read_arms,
    sweep_table,
    tables,
    thoughts_section,
)
from eval.scoring.core import Score
from eval.thinking.answers import Way
from model import ModelConfig

from ..browser import needs_browser, shows

TASK = "causal_loop_v2"
OWN = Way("thoughts", 24, 3)
COT = Way("cot")


def write_results(run: Path, found: dict[Way, list[float]], number: int = 0) -> None:
    """A results file as eval/thoughts.py writes them: the whole, then its two problem depths."""
    tables: dict[str, dict] = {
        table: {}
        for table in ("results", "baselines", "group_subtasks", "configs", "n-shot", "higher_is_better")
    }
    samples = {}
    for place, (way, accuracies) in enumerate(found.items()):
        mark = f"@way={number}.{place}"
        names = [f"thoughts_{TASK}{part}{mark}" for part in ("", "_problem_depth1", "_problem_depth2")]
        for name, depth, accuracy in zip(names, (None, 1, 2), accuracies, strict=True):
            passes = 3.0 + (way.num_iterations or 0)
            metrics = {"acc": accuracy, "forward_passes": passes, "cache_bytes": 1000.0}
            metrics["peak_cache_bytes"] = 10.0 * (way.kv_budget or 100)
            entry = {f"{metric},none": value for metric, value in metrics.items()}
            entry |= {f"{metric}_stderr,none": 0.01 for metric in metrics}
            entry |= {"latency_seconds,batch=1": 0.25, "latency_seconds_stderr,batch=1": "N/A"}
            entry |= {"latency_seconds,batch=8": 0.125, "latency_seconds_stderr,batch=8": "N/A"}
            tables["results"][name] = entry
            tables["baselines"][name] = {"chance": {"value": 0.125, "stderr": None}}
            tables["group_subtasks"][name] = names[1:] if depth is None else []
            buffer = way.kv_buffer if way.kv_budget else None
            facts = {
                **way._asdict(),
                "kv_buffer": buffer,
                "problem_set": TASK,
                "problem_depth": depth,
                "task": name,
            }
            tables["configs"][name] = facts
            tables["n-shot"][name] = 0
            tables["higher_is_better"][name] = {key: key == "acc" for key in (*metrics, "latency_seconds")}
            samples[name] = {"effective": 40 if depth is None else 20}
    (run / "eval").mkdir(parents=True, exist_ok=True)
    report = {**tables, "n-samples": samples, "config": {}}
    (run / "eval" / f"results_{number}.json").write_text(json.dumps(report))


def run_folder(folder: Path, name: str, latents: bool = True) -> Path:
    run = folder / name
    (run / "export").mkdir(parents=True)
    sizes = {"vocab_size": 300, "use_moe": False}
    if latents:
        sizes["latent_cot"] = {"num_latents": 24}
    (run / "export" / "config.json").write_text(json.dumps(ModelConfig.from_dict(sizes).to_dict()))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 70, "loss": 1.0, "tokens": 9000}) + "\n")
    return run


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two seeds of kava, one of cot; a run of kava has two results files."""
    runs = [run_folder(tmp_path, name, name != "cot-0") for name in ("kava-0", "kava-1", "cot-0")]
    for run, accuracy in zip(runs, (0.5, 0.7), strict=False):
        swept = {OWN._replace(num_iterations=1): [0.25, 0.5, 0.0], OWN: [accuracy, 1.0, 0.25]}
        write_results(run, swept, 0)
        controls = {OWN._replace(replace="shuffled"): [0.125, 0.25, 0.0]}
        write_results(run, controls, 1)
    budgets = {COT._replace(kv_budget=n, kv_buffer=8): [n / 100, 0.5, 0.5] for n in (32, 16)}
    write_results(runs[2], {COT: [0.9, 1.0, 0.8], **budgets})
    return runs


def test_seeds_of_a_method_share_a_row_with_their_control(folders):
    arms = read_arms(read_runs(folders)[0])[TASK]
    assert [(arm.name, arm.seeds, arm.own) for arm in arms] == [("kava", 2, OWN), ("cot", 1, COT)]
    table = methods_table(arms)
    kava, cot = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert kava["trained on"] == "70 steps, 9,000 tokens"
    assert (kava["seeds"], kava["n"], kava["answers by"]) == ("2", "40", "thoughts")
    # Standard error of the mean over seeds: half the distance between two values.
    assert kava["accuracy"] == "0.600 ± 0.100"
    assert (kava["shuffled"], kava["zeroed"]) == ("0.125 ± 0.000", "–")
    assert cot["accuracy"] == "0.900 ± 0.010"
    assert (kava["forward passes"], kava["cache bytes"]) == ("6.0", "1,000")
    assert (kava["ms alone"], kava["ms in a batch"]) == ("250.0", "125.0")


def test_depths_and_settings(folders):
    arms = read_arms(read_runs(folders)[0])[TASK]
    table = depth_table(arms)
    assert "chance 0.125" in table.title
    assert table.header == ("method", "1", "2")
    assert table.rows == [
        ("kava", "1.000 ± 0.000", "0.250 ± 0.000"),
        ("cot", "1.000 ± 0.010", "0.800 ± 0.010"),
    ]
    rows = sweep_table(arms).rows
    assert ("kava", "thoughts", "24", "1", "–", "0.250 ± 0.000", "4.0", "1,000") in rows
    assert ("cot", "cot", "–", "–", "16", "0.160 ± 0.010", "3.0", "160") in rows
    assert len(rows) == 2 + 3  # controls have columns of their own


def test_ways_to_score_the_cache_are_told_apart(folders):
    """In the table; the picture sweeps the budget alone. Older files do not name what could not be chosen."""
    write_results(folders[2], {COT._replace(kv_budget=16, kv_buffer=8, kv_lambda=1.0): [0.3, 0.5, 0.5]}, 1)
    arms = read_arms(read_runs(folders)[0])[TASK]
    assert ("cot", "cot", "–", "–", "16, kv_lambda=1.0", "0.300 ± 0.010", "3.0", "160") in sweep_table(
        arms
    ).rows
    assert budget_figure("", arms[1:]).axes[1].lines[0].get_xdata().tolist() == [16, 32]
    path = folders[2] / "eval" / "results_0.json"
    path.write_text(path.read_text().replace('"kv_lambda"', '"a"').replace('"kv_window"', '"b"'))
    (cot,) = read_arms(read_runs(folders[2:])[0])[TASK]
    assert COT._replace(kv_budget=16, kv_buffer=8) in cot.ways


def test_published_results_appear_only_on_gsm8k(folders):
    arms = read_arms(read_runs(folders)[0])[TASK]
    assert not any("Published" in table.title for table in tables(TASK, arms))
    (published,) = (table for table in tables("gsm8k", arms) if "Published" in table.title)
    assert ("Llama-3.2-1B", "KaVa", "56.5") in [row[:3] for row in published.rows]


def test_pictures_show_the_numbers(folders):
    pictures = figures(TASK, read_arms(read_runs(folders)[0])[TASK])
    by = ("depth", "passes", "iterations")
    assert list(pictures) == [*(f"accuracy_by_{name}" for name in by), "cache_budget"]

    def points(name: str, panel: int, line: int) -> list[tuple[float, float]]:
        curve = pictures[name].axes[panel].containers[line].lines[0]
        return [(float(x), float(y)) for x, y in curve.get_xydata()]

    assert points("accuracy_by_depth", 0, 0) == [(1, 1.0), (2, 0.25)]
    assert points("accuracy_by_passes", 0, 0) == [(6, pytest.approx(0.6))]
    assert points("accuracy_by_passes", 0, 1) == [(3, 0.9)]  # budgets of the cache are in their own picture
    assert points("accuracy_by_iterations", 0, 0) == [(1, 0.25), (3, pytest.approx(0.6))]
    assert points("cache_budget", 0, 0) == [(16, 0.16), (32, 0.32)]
    sizes = pictures["cache_budget"].axes[1].lines[0].get_xydata().tolist()
    assert sizes == [[16, 160], [32, 320]]


def test_the_page_has_the_section_and_other_sections_leave_thoughts_alone(folders):
    runs, _ = read_runs(folders)
    assert all(run.results == [] for run in runs)  # a shuffled score is not the task's
    text = to_page("Runs", "", [thoughts_section("Thoughts", runs)])
    assert text.count("<img") == 4
    assert "0.600&nbsp;±&nbsp;0.100" in text
    assert thoughts_section("Thoughts", []).empty


@needs_browser
def test_a_browser_shows_the_page_about_methods(folders, tmp_path):
    shows(build_page(read_runs(folders)[0]), tmp_path)


def test_an_older_results_file_is_refused_in_one_line(folders):
    path = folders[2] / "eval" / "results_0.json"
    path.write_text(path.read_text().replace('"kv_buffer"', '"kv_spare"'))
    with pytest.raises(
        ValueError, match="cot-0 lacks 'kv_buffer' of thoughts_.*: run eval/thoughts.py again"
    ):
        read_arms(read_runs(folders)[0])


def test_the_error_over_seeds_is_the_standard_error_of_their_mean():
    values = [0.2, 0.5, 0.9]
    found = over_seeds([Score(value, 0.01) for value in values])
    assert found.value == pytest.approx(statistics.mean(values))
    variance = sum((value - found.value) ** 2 for value in values) / 2
    assert found.stderr == pytest.approx((variance / 3) ** 0.5)
    assert over_seeds([Score(0.2, 0.01)]) == Score(0.2, 0.01)

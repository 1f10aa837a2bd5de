"""The report about several runs: tables and figures show what the results files say."""

import json
import math
import shutil
from pathlib import Path

import pytest

from eval import report
from eval.reports import scores as report_scores
from eval.reports.runs import Result, Run, read_results, read_runs
from eval.reports.scores import babi_section
from eval.scoring.core import Score
from model import load_pretrained
from model.counts import flops_per_token, num_parameters
from model.export_files import load_config

from .test_report import Page, metrics_lines, write_metrics

OWN_DEPTH = 2  # of the tiny model


def entry(task: str, accuracy: float, n: int = 100, **more: object) -> dict:
    """What `results_file` takes: one task at one setting."""
    return {
        "task": task,
        "metrics": {"acc,none": accuracy},
        "n": n,
        "num_steps": OWN_DEPTH,
        "shots": 0,
        **more,
    }


def results_file(entries: list[dict]) -> dict:
    """A results file in the format of eval/scoring/results.py."""
    tables: dict[str, dict] = {}

    def put(table: str, name: str, value: object) -> None:
        tables.setdefault(table, {})[name] = value

    for e in entries:
        name = e["task"] + e.get("suffix", "")
        result: dict = {"alias": name}
        for key, value in e["metrics"].items():
            metric, filter_name = key.split(",")
            spread = math.sqrt(value * (1 - value) / (e["n"] - 1)) if e["n"] > 1 and value <= 1 else "N/A"
            result |= {key: value, f"{metric}_stderr,{filter_name}": spread}
        result |= {"num_steps": e["num_steps"], "mean_steps": e.get("mean_steps"), "seconds_per_answer": 0.1}
        put("results", name, result)
        put("configs", name, {"task": e["task"], "num_steps": 2, "num_samples": e.get("samples", 0)})
        put("group_subtasks", name, [part + e.get("suffix", "") for part in e.get("parts", ())])
        put("n-shot", name, e["shots"])
        put("n-samples", name, {"original": e["n"], "effective": e["n"]})
        put("higher_is_better", name, {k.split(",")[0]: e.get("rising", True) for k in e["metrics"]})
        guesses = e.get("guesses", {"chance": 0.25, "majority": 0.26})
        put("baselines", name, {kind: {"value": v, "stderr": None} for kind, v in guesses.items()})
    return {**tables, "config": {"num_steps": 2, "decontamination": "13-grams of the test sets removed"}}


def babi(accuracies: list[float], **more: object) -> list[dict]:
    names = [f"babi_qa{i}" for i in range(1, 21)]
    pooled = entry("babi", sum(accuracies) / 20, n=2000, parts=names, **more)
    return [pooled, *(entry(name, value, **more) for name, value in zip(names, accuracies, strict=True))]


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """A run folder with a looped model at several depths, shots and votes; numbers that are easy to find."""
    folder = tmp_path / "runs" / "looped"
    (folder / "eval").mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "export")
    lines = metrics_lines(4)
    scores = {"arc_easy": {"acc,none": 0.3, "acc_stderr,none": 0.05}, "babi": {"acc,none": 0.1}}
    lines.append({"step": 2, "tokens": 2000, "eval": scores})
    lines.append({"step": 4, "tokens": 4000, "eval_failed": "killed after <evaluation.timeout_seconds=5>"})
    write_metrics(folder, lines)
    files = [
        [
            entry("arc_easy", 0.31, suffix="@num_steps=1", num_steps=1, mean_steps=1.0),
            entry("arc_easy", 0.42, mean_steps=2.0),
            entry("arc_easy", 0.37, suffix="@num_steps=adaptive", num_steps="adaptive", mean_steps=1.5),
            *babi([0.97] * 15 + [0.5] * 5),
        ],
        [entry("logiqa", 0.20 + k / 100, suffix=f"@shots={k}" if k else "", shots=k) for k in (0, 2, 8)],
        *(
            [
                entry(
                    "gsm8k",
                    0.1,
                    samples=k,
                    shots=5,
                    metrics={"acc,none": 0.1, f"exact_match,maj@{k}": 0.1 + k / 100},
                )
            ]
            for k in (4, 16)
        ),
        [entry("gsm8k", 0.05, suffix="@num_steps=8", num_steps=8, mean_steps=8.0, shots=5)],
        [
            entry(
                "perplexity",
                0,
                metrics={"bits_per_byte,none": 2.5},
                rising=False,
                guesses={"uniform bytes": 8.0},
            )
        ],
    ]
    for number, entries in enumerate(files):
        (folder / "eval" / f"results_{number}.json").write_text(json.dumps(results_file(entries)))
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A results file without a run folder, of an older version that has no depths."""
    folder = tmp_path / "runs" / "dense" / "eval"
    folder.mkdir(parents=True)
    old = results_file([entry("arc_easy", 0.33, n=50, num_steps=None)])
    old["configs"] = {"arc_easy": {"num_fewshot": 0}}
    old["config"] = {"num_steps": 1}
    for key in ("num_steps", "mean_steps", "seconds_per_answer"):
        del old["results"]["arc_easy"][key]
    (folder / "results_1.json").write_text(json.dumps(old))
    return folder / "results_1.json"


def table_row(page: Page, *start: str) -> list[str]:
    """The cells of a row that starts with these, up to the end of the longest table."""
    for i in range(len(page.cells)):
        if page.cells[i : i + len(start)] == list(start):
            return [cell.replace("\xa0", " ") for cell in page.cells[i : i + 12]]
    raise AssertionError(f"no row {start}")


def test_the_page_about_several_runs(run, other, tmp_path, run_script, capsys):
    (tmp_path / "bench.json").write_text("{}")
    (tmp_path / "data").mkdir()
    out = tmp_path / "page.html"
    run_script("report.py", run, other, tmp_path / "bench.json", tmp_path / "data", "--out", out)
    printed = capsys.readouterr().out
    for name in ("bench.json", "data"):
        assert f"left out: {tmp_path / name} is neither a run folder nor a results file" in printed
    page = Page(out.read_text(encoding="utf-8"))
    config = load_config(run / "export")
    model = load_pretrained(run / "export")
    layer = sum(p.numel() for p in model.model.layers[1].parameters())  # the looped one, run twice
    sizes = [num_parameters(config), num_parameters(config, active=True), num_parameters(config) + layer]
    assert table_row(page, "looped")[:9] == [
        "looped", *(f"{size:,}" for size in sizes), "4", "4,000", "1.2500", "1.2500",
        "13-grams of the test sets removed",
    ]  # fmt: skip
    assert table_row(page, "dense")[1:9] == ["–"] * 7 + ["unknown"]
    cells = table_row(page, "arc_easy", "acc")
    assert cells[2:8] == ["0", "100/50", "0.420 ± 0.050", "0.330 ± 0.067", "0.250", "0.260"]
    assert table_row(page, "perplexity", "bits_per_byte")[4:9] == [
        "2.500",
        "–",
        "–",
        "–",
        "uniform bytes 8.000",
    ]
    assert table_row(page, "gsm8k", "exact_match,maj@16")[2:5] == ["5", "100", "0.260 ± 0.044"]
    assert table_row(page, "arc_easy", "looped", "adaptive")[3:5] == ["1.50", "0.370 ± 0.049"]
    assert table_row(page, "arc_easy", "looped", "2 (own)")[3:5] == ["2.00", "0.420 ± 0.050"]
    mean_error = 100 * (15 * 0.03 + 5 * 0.5) / 20
    assert table_row(page, "looped", f"{mean_error:.2f}")[2:4] == ["5", "this report"]
    assert table_row(page, "PonderNet")[1:3] == ["0.15", "0"]
    assert "looped, step 4: killed after <evaluation.timeout_seconds=5>" in page.text
    # Losses, tasks, babi's parts, depth, shots, votes, training, published models.
    assert page.tags.count("img") == 8


def test_every_published_figure_names_its_source():
    published = json.loads(report_scores.PUBLISHED.read_text())
    models = published["models"] + published["babi"]
    assert len({model["model"] for model in models}) == len(models)
    for model in models + published["latent_chain_of_thought"]:
        assert model["source"]
        assert isinstance(model["checked"], bool)
    for model in published["models"]:
        assert all(0 < score["value"] < 100 for score in model["scores"])
        assert {score["metric"] for score in model["scores"]} <= {"acc", "acc_norm", None}


def read(run: Path) -> Run:
    runs, _ = read_runs([run])
    return runs[0]


def points(panels: report_scores.Panels, task: str, label: str) -> list[tuple[float, float, bool]]:
    curve = panels[task][0][label]
    return [(p.x, p.score.value, p.starred) for p in sorted(curve.points, key=lambda p: p.x)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The panels that the sections give to curves_figure."""
    panels: list = []
    original = report_scores.curves_figure

    def figure(given: report_scores.Panels, *arguments: object, **options: object) -> object:
        panels.append(given)
        return original(given, *arguments, **options)

    monkeypatch.setattr(report_scores, "curves_figure", figure)
    return panels


def test_curves_hold_the_points_of_the_results(run, drawn):
    report_scores.by_depth([read(run)])
    expected = [(1.0, 0.31, False), (1.5, 0.37, True), (2.0, 0.42, False)]
    assert points(drawn[0], "arc_easy", "looped") == expected
    assert drawn[0]["arc_easy"][1] == {"chance": Score(0.25), "majority": Score(0.26)}
    report_scores.by_shots([read(run)])
    assert points(drawn[1], "logiqa", "looped") == [(0, 0.2, False), (2, 0.22, False), (8, 0.28, False)]
    assert list(drawn[1]) == ["logiqa"]
    report_scores.during_training([read(run)])
    assert points(drawn[2], "arc_easy", "looped") == [(2000, 0.3, False)]
    assert set(drawn[2]) == {"arc_easy", "babi"}


def test_votes_and_depth_are_compared_at_equal_flops(run, drawn):
    report_scores.votes_against_steps([read(run)])
    (panels,) = drawn
    assert list(panels) == ["gsm8k, 5-shot"]
    votes = points(panels, "gsm8k, 5-shot", "looped, majority vote")
    assert votes == [(4, pytest.approx(0.14), False), (16, pytest.approx(0.26), False)]
    config = load_config(run / "export")
    length = config.max_position_embeddings
    cost = flops_per_token(config, length, 8) / flops_per_token(config, length, OWN_DEPTH)
    deeper = points(panels, "gsm8k, 5-shot", "looped, loop steps")
    assert deeper == [(1, 0.1, False), (pytest.approx(cost), 0.05, False)]
    assert panels["gsm8k, 5-shot"][0]["looped, majority vote"].dashed


def test_the_newest_of_equal_settings_counts(run):
    def accuracy() -> list[float]:
        found = [r for r in read(run).results if (r.task, r.num_steps) == ("arc_easy", OWN_DEPTH)]
        return [r.accuracy.value for r in found if r.accuracy is not None]

    assert accuracy() == [0.42]
    newer = results_file([entry("arc_easy", 0.5, mean_steps=2.0)])
    (run / "eval" / "results_9.json").write_text(json.dumps(newer))
    assert accuracy() == [0.5]


def test_depths_asked_for_without_the_own_one_are_told_apart_from_it():
    report_ = results_file([entry("arc_easy", 0.4, suffix="@num_steps=4", num_steps=4), entry("babi", 0.5)])
    results: dict[str, Result] = {result.task: result for result in read_results(report_)}
    assert (results["arc_easy"].is_own_depth, results["arc_easy"].is_plain) == (False, False)
    assert (results["babi"].is_own_depth, results["babi"].is_plain) == (True, True)


def test_older_files_call_loop_steps_depth():
    new = results_file([entry("arc_easy", 0.4), entry("arc_easy", 0.3, suffix="@num_steps=4", num_steps=4)])
    old = json.loads(json.dumps(new))
    for result in old["results"].values():
        result["depth"] = result.pop("num_steps")
    assert [result.num_steps for result in read_results(old)] == [OWN_DEPTH, 4]
    assert read_results(old) == read_results(new)


def test_a_babi_task_with_five_percent_of_errors_does_not_count_as_failed():
    results = read_results(results_file(babi([0.95] * 19 + [0.94])))
    one = Run("one", None, [], {}, results, None)
    (table,) = babi_section([one], []).blocks
    assert [row[2] for row in table.rows] == ["1"]


def test_equal_names_are_numbered_and_the_page_reports_an_unreadable_model(run, tmp_path):
    shutil.rmtree(run / "eval")
    twin = tmp_path / "elsewhere" / "looped"
    shutil.copytree(run, twin)
    old = json.loads((twin / "export/config.json").read_text())
    (twin / "export/config.json").write_text(json.dumps({**old, "num_prelude_layers": 1}))
    runs, _ = read_runs([run, twin])
    assert [r.name for r in runs] == ["looped", "looped (2)"]
    page = Page(report.build_page(runs))
    assert table_row(page, "looped (2)")[1:5] == ["–", "–", "–", "4"]
    alone = Page(report.build_page([read(twin)]))
    assert "export/config.json cannot be read: " in alone.text
    assert "num_prelude_layers" in alone.text


def test_a_real_evaluation_of_several_tasks_is_drawn(checkpoint, data_root, tmp_path, run_script):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder / "export")
    run_script(
        "run.py", "--checkpoint", checkpoint, "--tasks", "arc,logiqa,babi", "--data", data_root, "--limit", 2,
        "--output_path", folder / "eval",
    )  # fmt: skip
    one = read(folder)
    (path,) = one.reports
    written = json.loads(path.read_text())["results"]
    assert {r.task for r in one.results} == set(written)
    assert {r.task for r in one.top_results()} == {"arc_easy", "arc_challenge", "logiqa", "babi"}
    for result in one.results:
        assert result.main is not None
        assert result.metrics[result.main].value == written[result.task][result.main]
    page = Page(report.build_page([one]))
    assert page.tags.count("img") == 3  # tasks, the parts of babi, published models
    assert "Pythia-410M" in page.cells


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{}", "is neither a run folder nor a results file"),
        ("results.txt", "", "is neither a run folder nor a results file"),
        ("results.json", '{"results": {"a": {}}}', "lacks a field that eval/run.py writes"),
        ("results.json", "[", "is not JSON"),
    ],
)
def test_a_file_that_is_not_a_results_file_is_one_line(tmp_path, run_script, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run_script("report.py", tmp_path / name, "--out", tmp_path / "page.html")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()

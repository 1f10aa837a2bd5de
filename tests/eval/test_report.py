"""The report page: self-contained, complete, and honest about what is missing."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from eval import report
from eval.reports.figures import expert_load_figure, loss_figure
from eval.reports.runs import read_runs
from eval.scoring.core import Score

from ..browser import needs_browser, shows


class Page(HTMLParser):
    """Collects addresses, pictures, text and the cells of tables; checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data


def metrics_lines(steps: int) -> list[dict]:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        loads = rng.dirichlet([3.0] * 4, size=2)
        lines.append(
            {
                "step": step,
                "loss": 5 / step,
                "grad_norm": 1.0 / step,
                "lr": 1e-3,
                "tokens": 1000 * step,
                "tokens_per_second": 500.0 + step,
                "recurrence_depth": 1 + step % 4,
                "expert_load": loads.tolist(),
            }
        )
    lines[-1]["val_loss"] = 1.25
    return lines


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, run_script) -> Path:
    """A run folder with everything a report reads; the scores are a real evaluation's."""
    directory = tmp_path / "<demo> & co"
    directory.mkdir()
    shutil.copytree(checkpoint, directory / "export")
    (directory / "config.yaml").write_text(
        "max_steps: 300\nname: <script>alert(1)</script>\ndata:\n  seed: 7\n"
    )
    write_metrics(directory, metrics_lines(300))
    run_script(
        "causal_loop.py", "--checkpoint", checkpoint, "--num_samples", 3, "--output_path", directory / "eval",
        "--log_samples",
    )  # fmt: skip
    return directory


def page_of(*paths: Path) -> str:
    runs, left_out = read_runs(paths)
    assert left_out == []
    return report.build_page(runs)


def write_metrics(directory: Path, lines: list[dict]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_page_is_self_contained_and_complete(run, run_script, capsys, tmp_path):
    capsys.readouterr()
    run_script("report.py", run, "--out", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == 3
    for address in page.addresses:
        assert address.startswith("data:image/png;base64,")
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(address.split(",", 1)[1])))
        assert picture[..., :3].std() > 0.05  # not blank
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<script>alert(1)</script>" in page.text
    assert "<demo> & co" in page.text
    cells = dict(zip(page.cells[::2], page.cells[1::2], strict=False))
    assert cells["max_steps"] == "300"
    assert cells["seed"] == "7"
    assert cells["steps done"] == "300"
    assert cells["tokens seen"] == "300,000"
    assert cells["last validation loss"] == "1.2500"
    assert cells["median tokens per second"] == "651"
    assert "missing" not in text.split("</style>")[1]
    (results_path,) = (run / "eval").glob("results_*.json")
    results = json.loads(results_path.read_text())
    assert cells["parameters"] == f"{results['config']['model_num_parameters']:,}"
    # The terminal shows the scores of the results file.
    table = capsys.readouterr().out
    for level in range(1, 5):
        entry = results["results"][f"causal_loop_level{level}"]
        assert f"{entry['exact_match,trace']:.3f} ± {entry['exact_match_stderr,trace']:.3f}" in table
        assert f"causal_loop_level{level}" in page.cells
    (samples_path,) = (run / "eval").glob("samples_causal_loop_*.jsonl")
    sample = json.loads(samples_path.read_text().splitlines()[0])
    assert sample["program"] in page.text


@needs_browser
def test_a_browser_shows_the_page_about_a_run(run, tmp_path):
    shows(page_of(run), tmp_path)


def test_empty_run_names_what_is_missing(tmp_path):
    page = Page(page_of(tmp_path))
    for name in (
        "config.yaml",
        "export/config.json",
        "metrics.jsonl",
        "expert load",
        "causal-loop",
        "results_*",
    ):
        assert name in page.text
    assert page.tags.count("img") == 0


def test_dense_run_of_one_step(tmp_path):
    write_metrics(
        tmp_path, [{"step": 1, "loss": 5.0, "grad_norm": 1.0, "lr": 0.1, "expert_load": [], "val_loss": None}]
    )
    page = Page(page_of(tmp_path))
    assert page.tags.count("img") == 1
    assert "No expert load" in page.text
    assert "No validation loss" in page.text


def test_figures_show_the_data():
    lines = metrics_lines(500)
    axes = loss_figure(lines).axes
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[line["loss"] for line in lines], [1.25]]
    figure = expert_load_figure(lines)
    loads = np.array([line["expert_load"] for line in lines])  # (steps, layers, experts)
    for layer in range(2):
        picture = figure.axes[layer].images[0].get_array()
        assert picture.shape == (4, 200)
        # 500 steps in 200 columns: the first 100 columns average 3 steps, the others 2
        np.testing.assert_allclose(picture[:, 0], loads[:3, layer].mean(0))
        np.testing.assert_allclose(picture[:, -1], loads[-2:, layer].mean(0))
        np.testing.assert_allclose(figure.axes[2].lines[layer].get_ydata(), loads[:, layer].max(-1) * 4)
    with pytest.raises(ValueError, match=r"must be \[layer\]\[expert\], it has 1 levels"):
        expert_load_figure([{"step": 1, "expert_load": [0.5, 0.5]}])


def test_level_scores_of_a_single_sample():
    entry = {"exact_match,trace": 1.0, "exact_match_stderr,trace": "N/A"}
    entry |= {"exact_match,direct": 0.0, "exact_match_stderr,direct": "N/A"}
    baseline = {"value": 1.0, "stderr": None}
    scores = report.level_scores(
        {
            "results": {"causal_loop_level3": entry, "causal_loop": entry, "babi_qa3": {}},
            "baselines": {"causal_loop_level3": {"majority": baseline, "one_step": baseline}},
        }
    )
    assert scores == {
        "3": {name: Score(1.0) for name in ("trace", "majority", "one_step")} | {"direct": Score(0.0)}
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval/results_1.json", "[1]", "results_1.json holds a JSON list"),
        ("eval/results_1.json", "", "results_1.json is not JSON"),
        ("export/config.json", "{", "config.json is not JSON"),
    ],
)
def test_damaged_file_is_one_line(tmp_path, run_script, capsys, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run_script("report.py", tmp_path, "--out", tmp_path / "report.html")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_missing_run_is_one_line(tmp_path, run_script, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_script("report.py", tmp_path / "nothing", "--out", tmp_path / "report.html")
    assert exit_.value.code == 2
    message = f"error: {tmp_path / 'nothing'} does not exist: give the output_dir"
    assert capsys.readouterr().err.startswith(message)

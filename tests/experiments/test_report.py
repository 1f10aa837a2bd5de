"""The report of the stored records equals the stored report; unequal cells are not compared.

The records in cells/ are synthetic, as their size says, and hold no result. After an intended change of
the report, `test_the_report_is_the_stored_one` names the file to copy over RESULTS_synthetic.md.
"""

import copy
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import report
from experiments.publish import publish
from experiments.reporting.claims import CLAIMS, Unit, claim_verdict, command_of, judge, read_claims
from experiments.reporting.figures import enough_steps
from experiments.reporting.records import read_records, value_of

from ..browser import needs_browser, shows
from ..conftest import ROOT

HERE = Path(__file__).parent
EXPECTED = HERE / "RESULTS_synthetic.md"
Records = list[dict[str, Any]]
README = f"# Project\n\n{report.BEGIN}\nold\n{report.END}\n\nThe rest.\n"


def stored(*names: str) -> Records:
    return [
        record
        for name in names or ("p_hop", "causal_loop_v2", "wikipedia", "studies")
        for record in json.loads((HERE / "cells" / f"{name}_synthetic.json").read_text())
    ]


def share(correct: str) -> float:
    return correct.count("1") / len(correct)


def place(records: Records, out: Path) -> Path:
    """As experiments/run.py leaves them."""
    out.mkdir(parents=True, exist_ok=True)
    for record in records:
        folder = out / "cells" / record["cell"]
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(record))
    return out


def project(folder: Path) -> Path:
    """A README; the path of the report."""
    (folder / "docs").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    return folder / "docs/RESULTS.md"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all stored records; two cells of a matrix are not done."""
    folder = tmp_path_factory.mktemp("report")
    runs = place(stored(), folder / "runs")
    lost, failed = "p_hop/synthetic/100/kv/3", "p_hop/synthetic/100/kv/4"
    cells = [*(record["cell"] for record in stored("p_hop")), lost, failed]
    (runs / "synthetic.matrix.json").write_text(json.dumps({"matrix": "synthetic", "cells": cells}))
    (runs / "cells" / failed).mkdir(parents=True)
    (runs / "cells" / failed / "failed.json").write_text(
        json.dumps({"cell": failed, "problem": "main.py failed with code 1: see train.log"})
    )
    out = project(folder / "project")
    report.write([runs], out)
    return out


def test_the_report_is_the_stored_one(written):
    assert written.read_text() == EXPECTED.read_text(), f"intended? cp {written} {EXPECTED}"


def test_the_same_records_elsewhere_and_in_another_order_give_the_same_bytes(written, tmp_path):
    """The records in reverse order, spread over two folders."""
    records = list(reversed(stored()))
    runs = [place(records[i::2], tmp_path / f"runs{i}") for i in range(2)]
    shutil.copytree(written.parents[2] / "runs/cells/p_hop/synthetic/100/kv/4", runs[0] / "failed")
    names = ["p_hop/synthetic/100/kv/3"]
    (runs[1] / "synthetic.matrix.json").write_text(json.dumps({"matrix": "synthetic", "cells": names}))
    out = project(tmp_path / "project")
    report.write(list(reversed(runs)), out)
    before, after = (
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (written.parents[1], tmp_path / "project")
    )
    assert len(before) >= 9
    assert before == after


def test_effects_are_those_of_the_records(written):
    """Straight from the stored cells, for the pair of the headline."""
    cells = {(r["group"], r["seed"]): r for r in stored("p_hop")}
    differences = [
        share(cells["loop", seed]["correct"]) - share(cells["dense_params", seed]["correct"])
        for seed in range(5)
    ]
    effect = f"+{statistics.mean(differences):.3f} ["
    sides = [
        statistics.mean(share(cells[group, seed]["correct"]) for seed in range(5))
        for group in ("loop", "dense_params")
    ]
    readme = (written.parents[1] / "README.md").read_text()
    assert f"p_hop {effect}" in written.read_text()
    assert f"| p_hop | {sides[0]:.3f} | {sides[1]:.3f} | {effect}" in readme


def test_every_claim_is_reported_with_its_commands(written):
    text = written.read_text()
    ids = [
        yaml.safe_load(block)["id"] for block in re.findall(r"```yaml\n(.*?)```", CLAIMS.read_text(), re.S)
    ]
    assert len(ids) == len(set(ids)) >= 11
    for name in ids:
        assert f"(`{name}`)" in text
    assert "--cells 'p_hop/synthetic/100/dense_params/*'" in text
    assert "| `p_hop/synthetic/100/kv/3` | not run |" in text
    assert "| `p_hop/synthetic/100/kv/4` | main.py failed with code 1: see train.log |" in text


def test_pictures_are_linked_and_the_page_stands_alone(written):
    linked = re.findall(r"!\[[^]]+\]\((.*?)\)", written.read_text())
    drawn = {path.name for path in (written.parent / "results").glob("*.png")}
    assert {Path(link).name for link in linked} == drawn
    assert drawn == {
        *("headline.png", "depth.png", "parameters.png", "inference_flops.png", "steps_depth.png"),
        *("by_steps.png", "by_examples.png", "by_shots.png"),
    }
    for link in linked:
        assert (written.parent / link).read_bytes().startswith(b"\x89PNG")
    page = (written.parent / "results/index.html").read_text()
    sources = re.findall(r'src="(.{10})', page)
    assert len(sources) == len(linked)
    assert set(sources) == {"data:image"}
    assert "href" not in page


def test_the_page_shows_no_markdown(written):
    """Text between tags, except quoted code."""
    page = (written.parent / "results/index.html").read_text().split("</style>")[1]
    shown = re.sub(r"<(pre|code)[^>]*>.*?</\1>", "", page, flags=re.S)
    shown = re.sub(r"<[^>]*>", "", shown)
    assert "**" not in shown
    assert "`" not in shown
    assert "undecided" in shown


@needs_browser
def test_a_browser_shows_the_page(written, tmp_path):
    shows((written.parent / "results/index.html").read_text(), tmp_path)


def test_the_readme_changes_only_between_its_lines(written):
    readme = (written.parents[1] / "README.md").read_text()
    assert readme.startswith(f"# Project\n\n{report.BEGIN}\n| task | loop | as many dense layers |")
    assert readme.endswith(f"](docs/results/headline.png)\n{report.END}\n\nThe rest.\n")


# Cells that must not be compared.


def changed(change: Callable[[dict[str, Any]], Any], where: Callable[[dict[str, Any]], bool]) -> Records:
    records = copy.deepcopy(stored("p_hop"))
    for record in filter(where, records):
        change(record)
    return records


def unit_of(records: Records, claim: str = "equal_parameters") -> Unit:
    (unit,) = [unit for unit in judge(read_claims(), records) if unit.claim.id == claim]
    return unit


def is_loop(record: dict[str, Any]) -> bool:
    return bool(record["group"] == "loop")


def test_an_unequal_pair_is_refused():
    unit = unit_of(changed(lambda r: r.update(parameters=50000), lambda r: is_loop(r) and r["seed"] == 2))
    assert (unit.verdict, unit.found) == ("undecided", None)
    assert unit.remark.startswith(
        "not compared, seed 2: loop has parameters 50,000 and dense_params 48,010, 3.98% apart"
    )


def test_a_seed_whose_value_is_nan_blocks_the_verdict():
    unit = unit_of(
        changed(lambda r: r["accuracy"].update({"4": math.nan}), lambda r: is_loop(r) and r["seed"] == 1)
    )
    assert (unit.verdict, unit.found) == ("undecided", None)
    assert unit.remark == "accuracy of loop, seed 1, is nan: without it the mean would flatter"


def test_steps_that_were_not_tested_are_named():
    records = changed(lambda r: r["accuracy"].pop("24"), lambda r: r["group"] == "fixed")
    unit = unit_of(records, "extrapolation_steps")
    assert (unit.verdict, unit.remark) == (
        "undecided",
        "accuracy of fixed at 24 steps, seed 0, has no value",
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_undecided(seeds):
    unit = unit_of([record for record in stored("p_hop") if record["seed"] < seeds])
    assert (unit.verdict, unit.found) == ("undecided", None)
    assert unit.remark == f"{seeds} of the 3 pairs that a verdict needs"
    assert len(unit.sides) == 2  # their means are shown


def test_a_seed_without_its_partner_is_left_out():
    records = [r for r in stored("p_hop") if not (r["group"] == "dense_params" and r["seed"] == 0)]
    unit = unit_of(records)
    assert unit.seeds == (1, 2, 3, 4)
    assert unit.remark == "no partner for loop, seed 0"
    loops = [r["accuracy"]["4"] for r in records if is_loop(r) and r["seed"]]
    assert unit.sides[0] == pytest.approx(statistics.mean(loops))


def test_another_budget_is_not_compared():
    records = changed(lambda r: r.update(budget="200"), is_loop)
    assert not [unit for unit in judge(read_claims(), records) if unit.claim.id == "equal_parameters"]
    (claim,) = [claim for claim in read_claims() if claim.id == "equal_parameters"]
    assert claim_verdict(claim, judge(read_claims(), records)) == "undecided"


def test_another_test_set_is_not_compared():
    unit = unit_of(changed(lambda r: r.update(num_samples=80), is_loop))
    assert unit.remark == "not compared, seed 0: tested on 80 and 40 samples"


def test_all_equal_rules_the_effect_out_and_supports_no_worse():
    """Every cell the same: as CLAIMS.md says, hi < m refutes `higher`, lo > -m supports `not_lower`."""
    same = stored("p_hop")[0]
    records = changed(lambda r: r.update({k: same[k] for k in ("correct",)}), lambda r: True)
    for record in records:
        record["accuracy"] = {str(record["trained_steps"]): share(same["correct"])}
    assert unit_of(records).interval == (0, 0)
    assert unit_of(records).verdict == "refuted"
    assert unit_of(records, "equal_flops").verdict == "supported"


def test_more_claims_widen_an_interval():
    """The same cells, tested alone and among others."""
    alone = judge([claim for claim in read_claims() if claim.id == "equal_parameters"], stored("p_hop"))[0]
    among = unit_of(stored("p_hop"))
    assert alone.interval is not None
    assert among.interval is not None
    assert among.interval.lo < alone.interval.lo < alone.interval.hi < among.interval.hi
    assert alone.adjusted < among.adjusted
    assert among.level < alone.level == 0.05


def test_a_claim_is_decided_by_all_its_tasks():
    records = stored("p_hop", "causal_loop_v2")
    both = copy.deepcopy(stored("p_hop"))
    for record in both:
        record |= {"task": "addition", "cell": record["cell"].replace("p_hop", "addition")}
    (claim,) = [claim for claim in read_claims() if claim.id == "equal_parameters"]
    assert claim_verdict(claim, judge([claim], records)) == "undecided"  # addition was not run
    assert claim_verdict(claim, judge([claim], [*records, *both])) == "supported"


def test_values_of_a_model_without_a_loop_hold_at_all_steps():
    dense = next(record for record in stored("p_hop") if record["group"] == "dense_flops")
    assert value_of(dense, "accuracy", 24) == value_of(dense, "accuracy", "2R") == dense["accuracy"]["1"]
    loop = next(record for record in stored("p_hop") if is_loop(record))
    assert value_of(loop, "accuracy", "2R") == loop["accuracy"]["8"]
    assert value_of(loop, "perplexity") is None


def test_enough_steps_are_the_fewest_near_the_best():
    assert enough_steps({"1": 0.3, "4": 0.79, "8": 0.8, "16": 0.805}) == 4


def test_a_command_names_the_matrix_and_all_seeds_of_a_cell():
    assert command_of(stored("p_hop")[0]) == (
        "python experiments/run.py --matrix synthetic --cells 'p_hop/synthetic/100/loop/*'"
    )


def test_published_records_give_the_same_records_as_their_run_folder(written, tmp_path):
    """Except for failures, which are not published: their cells are missing."""
    runs = written.parents[2] / "runs"
    (path,) = publish(runs, tmp_path)
    names, records = read_records(path)
    assert path == tmp_path / "synthetic.jsonl"
    assert names == json.loads((runs / "synthetic.matrix.json").read_text())["cells"]
    assert records == stored("p_hop")
    rest = place(stored("causal_loop_v2", "wikipedia", "studies"), tmp_path / "runs")
    before, after = report.read_runs([runs]), report.read_runs([rest, path])
    assert (after.records, after.studies) == (before.records, before.studies)
    assert (after.failed, after.missing) == ({}, [*before.missing, *before.failed])


def test_publishing_adds_to_the_records_replaces_the_same_cell_and_loses_none(tmp_path):
    first, second = stored("p_hop")[:2]
    cells = [first["cell"], second["cell"]]

    def ran(name: str, records: Records, cells: list[str]) -> Path:
        runs = place(records, tmp_path / name)
        runs.mkdir(exist_ok=True)
        (runs / "synthetic.matrix.json").write_text(json.dumps({"matrix": "synthetic", "cells": cells}))
        return runs

    out = tmp_path / "results"
    assert publish(ran("a", [second], cells), out) == {out / "synthetic.jsonl": 1}
    again = {**second, "final_loss": math.nan}
    publish(ran("b", [again, first], cells), out)
    found = read_records(out / "synthetic.jsonl")
    assert json.dumps(found) == json.dumps((cells, [first, again]))  # as text, since NaN differs from itself
    before = (out / "synthetic.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"1 records of cells .* no longer has, the first {second['cell']}"):
        publish(ran("c", [first], cells[:1]), out)
    with pytest.raises(ValueError, match="d holds no finished cell; give the --out"):
        publish(ran("d", [], cells), out)
    (tmp_path / "d/results.json").write_text("{}")  # as a matrix of methods of latent chain of thought has
    with pytest.raises(ValueError, match="d is a latent_cot matrix, whose results are in results.json"):
        publish(tmp_path / "d", out)
    assert (out / "synthetic.jsonl").read_bytes() == before


def test_a_damaged_line_of_a_file_of_records_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for text, message in (
        ("", "line 1 is damaged; restore it"),
        ('{"matrix": "x", "cells": []}\n{"cell"', "line 2 is damaged; restore it"),
        ('{"matrix": "x", "cells": []}\n{"cell": "a"}', "line 2: matrix is missing; add it; restore it"),
        ('{"cells": []}', "line 1: matrix is missing; add it; restore it"),
        ('{"matrix": "x", "cells": [3]}', r"line 1: cells\[0\]=3 is not text; restore it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x.jsonl, {message}"):
            report.read_runs([path])


def test_cells_of_a_sweep_are_counted_but_not_compared(tmp_path):
    record = stored("p_hop")[0]
    tried = {**record, "cell": "p_hop/synthetic/100/loop@lr=0.001/100"}
    runs = report.read_runs([place([record, tried], tmp_path)])
    assert (len(runs.records), runs.sweep) == (1, 1)


def test_a_damaged_cell_is_one_of_the_failed(tmp_path):
    first, second = stored("p_hop")[:2]
    runs = place([first, second], tmp_path)
    cell = runs / "cells" / second["cell"] / "cell.json"
    for text, problem in (
        ('{"cell": ', f"{cell} is damaged; remove it and run its cell again"),
        ('{"cell": "x"}', f"{cell}: matrix is missing; add it; remove it and run its cell again"),
    ):
        cell.write_text(text)
        found = report.read_runs([runs])
        assert [record["cell"] for record in found.records] == [first["cell"]]
        assert found.failed == {second["cell"]: problem}


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the --out"):
        report.read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no cell\.json below"):
        report.read_runs([tmp_path])
    record = stored("p_hop")[0]
    runs = [place([record], tmp_path / name) for name in ("a", "b")]
    with pytest.raises(ValueError, match=f"cell {record['cell']} is in .*/a/.* and .*/b/"):
        report.read_runs(runs)
    cell = tmp_path / "b/cells" / record["cell"] / "cell.json"
    cell.write_text('{"cell": ')
    out = project(tmp_path / "project")
    (tmp_path / "project/README.md").write_text("# Project\n")
    with pytest.raises(ValueError, match="README.md lacks the lines <!-- results:begin -->"):
        report.write([tmp_path / "a"], out)


def test_text_alone_makes_a_report_without_pictures(tmp_path):
    out = project(tmp_path / "project")
    report.write([place(stored("wikipedia"), tmp_path / "runs")], out)
    loops = [r["bits_per_byte"]["4"] for r in stored("wikipedia") if is_loop(r)]
    assert f"| loop | {statistics.mean(loops):.3f} [{min(loops):.3f}, {max(loops):.3f}] |" in out.read_text()
    assert {path.name for path in (out.parent / "results").iterdir()} == {"index.html", "by_shots.png"}


def test_a_task_that_no_claim_names_is_in_the_tables_and_not_in_the_headline(tmp_path):
    records = [record | {"task": "causal_loop_v2_held_out"} for record in stored("p_hop")]
    out = project(tmp_path / "project")
    report.write([place(records, tmp_path / "runs")], out)
    assert "No answer yet" in out.read_text()
    assert "### causal_loop_v2_held_out, synthetic" in out.read_text()
    assert not (out.parent / "results/headline.png").exists()


def test_the_command_makes_a_report_of_one_cell(tmp_path):
    """As after `experiments/run.py --cells`: no pair, no verdict, no headline picture."""
    out = project(tmp_path / "project")
    runs = place(stored("p_hop")[:1], tmp_path / "runs")
    command = [sys.executable, "experiments/report.py", "--runs", str(runs), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"written: {out}\n"), done.stderr
    assert "No answer yet" in out.read_text()
    assert "Nothing was tested" in out.read_text()
    assert "headline.png" not in (tmp_path / "project/README.md").read_text()

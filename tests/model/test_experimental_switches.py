"""Switches marked "not measured yet" in docs/MODEL.md: they exist, and no record names them."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from model import ModelConfig, RecurrenceConfig

from ..conftest import ROOT

MARK = re.compile(r"^\| `([\w.]+)(?:=(\w+))?` \|.*\| not measured yet \|$", re.MULTILINE)
# A mark goes, here and in the page, when a record names its switch.
UNTRIED = {
    "injection=gate",
    "halting.granularity",
    "halting.information_weight",
    "virtual_layers",
    "depth_schedule",
    "depth_per",
    "ema_decay",
    "position_mixing",
    "query_conditioned",
    "k_rope_source",
}
MARKED = MARK.findall((ROOT / "docs" / "MODEL.md").read_text())


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values in a record, including overrides such as model.recurrence.num_steps=2."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _settings(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, path)
    elif isinstance(value, str) and (override := re.fullmatch(r"([\w.]+)=(.*)", value)):
        try:
            yield override[1], json.loads(override[2])
        except json.JSONDecodeError:
            yield override[1], override[2]
    else:
        yield path, value


@pytest.fixture(scope="module")
def recorded() -> set[tuple[str, str]]:
    """Keys below model.recurrence that the records set, with their values as JSON."""
    found = set()
    for path in (ROOT / "experiments" / "results").rglob("*.json*"):
        text = path.read_text()
        for record in [text] if path.suffix == ".json" else text.splitlines():
            for key, value in _settings(json.loads(record)):
                if (name := re.search(r"\brecurrence\.([\w.]+)$", key)) is not None:
                    found.add((name[1], json.dumps(value)))
    return found


def test_the_records_are_understood(recorded):
    assert {("injection", '"none"'), ("num_steps", "4")} <= recorded


def test_the_page_marks_every_switch_that_is_untried():
    assert {f"{key}={value}" if value else key for key, value in MARKED} == UNTRIED
    assert len(MARKED) == (ROOT / "docs" / "MODEL.md").read_text().count("| not measured yet |")


@pytest.mark.parametrize(("key", "value"), MARKED)
def test_a_marked_switch_exists_and_no_record_names_it(recorded, key, value):
    section = dataclasses.asdict(RecurrenceConfig())
    *outer, name = key.split(".")
    for part in outer:
        section = section[part]
    default = json.dumps(section[name])
    if value:
        ModelConfig.from_dict({"preset": "nano", "recurrence": {"placement": "block", name: value}})
        assert (key, json.dumps(value)) not in recorded
    else:
        assert {setting for setting in recorded if setting[0] == key} <= {(key, default)}

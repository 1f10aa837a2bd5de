"""The pages for contributors name files that exist, and every file of a room is in the room's place."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("ARCHITECTURE", "MODEL", "TRAINING", "EVALUATION", "EXPERIMENTS")),
    *(f"docs/{name}.md" for name in ("LATENT_THOUGHT", "PLAN", "SCALING", "NOT_HERE", "RELIABILITY")),
]
ROOMS = ("common", "model", "data_pipeline", "pretrain", "distill", "eval", "experiments", "bench", "tests")
# What a page calls a file that its reader is to write.
TO_WRITE = re.compile(r"NAME")


def mentioned(text: str) -> set[str]:
    """Paths in back-ticks that end in a file's suffix or in a slash: `model/moe.py`, `eval/looping/`."""
    spans = re.findall(r"`([^`\s]+)`", text)
    return {s for s in spans if re.fullmatch(r"[\w./-]+(\.(py|yaml|json|md|sbatch|txt|jsonl)|/)", s)}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_that_exist(page):
    """A path counts from the root, or from the room that the page's line is about."""
    missing = {
        path
        for path in mentioned((ROOT / page).read_text())
        if not TO_WRITE.search(path)
        and path.split("/")[0] in ROOMS + ("docs", "slurm", "ds_configs", ".ci", ".github")
        and not (ROOT / path).exists()
    }
    assert missing == set()


def test_the_architecture_names_every_folder_of_the_rooms():
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    for room in ROOMS[:-1]:
        assert f"`{room}/`" in text
        for folder in sorted((ROOT / room).rglob("__init__.py")):
            name = folder.parent.relative_to(ROOT).as_posix()
            if name.count("/") == 1:
                assert f"`{name}/`" in text, name


@pytest.mark.parametrize("room", ["model", "pretrain"])
def test_the_architecture_names_every_file_at_the_top_of_a_room(room):
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    for path in sorted((ROOT / room).glob("*.py")):
        assert path.stem.startswith("__") or f"`{room}/{path.name}`" in text, path.name


def test_the_walks_name_files_from_the_root():
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    walks = text[text.index("## Three walks") : text.index("## What must always hold")]
    for path in mentioned(walks):
        assert not path.endswith(".py") or (ROOT / path).is_file(), path

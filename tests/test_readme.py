"""Every command of the README and the guides runs, in a copy of the project; slow ones shortened."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .model.hf_folders import llama_folder

ROOT = Path(__file__).parents[1]
# In the order in which they build on each other.
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("TRAINING", "EVALUATION", "MODEL", "EXPERIMENTS", "LATENT_THOUGHT")),
]
LINKED = ("PLAN", "LOG", "ARCHITECTURE", "NOT_HERE", "RESULTS")  # further pages with links, but no commands
# What shortens a command: (part of the command, what is added to it). Every command whose full length takes
# longer than seconds has a line here; `make test-slow` runs the demo and the real run at full length.
TINY_MODEL = "model.hidden_size=32 model.intermediate_size=64 model.moe_intermediate_size=32"
TINY_RUN = f"max_steps=2 global_batch_size=4 eval_every=0 {TINY_MODEL}"
SHORT = [
    (
        "make demo",
        "BUILD='sources.0.num_samples=400 sources.0.levels=[1,3]' "
        f"TRAIN='{TINY_RUN}' EVAL='--num_samples 4 --levels 1,3'",
    ),
    (
        "recipes/text.yaml",
        "sources.0.max_documents=60 sources.1.max_documents=1 sources.2.max_documents=3 "
        "sources.3.max_documents=30 tokenizer.train_bytes=300000 tokenizer.vocab_size=1000",
    ),
    ("distill_causal_loop.yaml", "sources.0.num_samples=400"),
    (
        "distill/main.py",
        "max_steps=2 optimizer.warmup_steps=1 global_batch_size=2 micro_batch_size=2 model.hidden_size=32",
    ),
    ("eval/thoughts.py", "--num_samples 8"),
    ("recipes/wikipedia.yaml", "sources.0.max_bytes=300000 validation_fraction=0.3"),
    ("build.py", "sources.0.max_bytes=300000 tokenizer.train_bytes=300000 tokenizer.vocab_size=1000"),
    ("real_cpu.yaml max_steps=380", TINY_RUN.replace("max_steps=2", "max_steps=4")),
    ("continue.yaml", "max_steps=2 eval_every=0 global_batch_size=2 data.sequence_length=64"),
    ("pretrain/main.py", TINY_RUN),
    ("pretrain/export.py", "--step 4"),
    ("experiments/run.py", "--matrix tests/experiments/tiny.yaml"),
    ("eval/reasoning.py", "--num_samples 20 --checkpoint runs/quick/cells/p_hop/small/4/loop/0/export"),
    ("causal_loop_v2.py", "--num_samples 80"),
    ("model.convert mla", "--calibration_tokens 512 --evaluation_tokens 512"),
    ("model.convert ranks", "--calibration_tokens 512 --evaluation_tokens 512"),
    ("gsm8k_cot.py", "--limit 1 --max_new_tokens 8"),
    ("eval/run.py", "--limit 1"),
    ("eval/arc.py", "--limit 2"),
    ("eval/logiqa.py", "--limit 2"),
    ("eval/babi.py", "--limit 1"),
    ("eval/gsm8k.py", "--limit 1 --max_new_tokens 8"),
    ("eval/causal_loop.py", "--num_samples 4"),
]


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    found = [line for block in blocks for line in block.splitlines()]
    assert found
    return found


def shortened(command: str) -> str:
    return command + next((f" {extra}" for part, extra in SHORT if part in command), "")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files under version control, with this environment in place of an installation."""
    copy = tmp_path_factory.mktemp("clone") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    sizes = {"hidden_size": 128, "head_dim": 64, "num_hidden_layers": 4, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama_folder(copy / "LLAMA_FOLDER", **sizes, **heads, max_position_embeddings=1024)
    return copy


def run(project: Path, command: str, timeout: int = 400, data_root: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    if data_root is not None:
        environment["DATA_ROOT"] = str(data_root)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("RANK", None)
    # The environment is there already; a set-up from the copy would repoint its editable installation.
    command = command.replace("make ", "make -o .venv/ready ", 1) if command.startswith("make ") else command
    done = subprocess.run(
        command, shell=True, cwd=project, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_shortening_belongs_to_a_command():
    everything = "\n".join(command for page in PAGES for command in commands(page))
    assert everything.count("\n") > 20
    for part, _ in SHORT:
        assert part in everything


def test_every_link_leads_to_a_file():
    for page in [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{n}.md" for n in LINKED)]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


@pytest.fixture(scope="module")
def demo(project: Path) -> str:
    """What `make demo` prints."""
    return run(project, shortened("make demo"))


def test_make_demo(project, demo):
    assert "causal_loop_level1" in demo
    assert (project / "runs/demo/report.html").stat().st_size > 20_000


@pytest.mark.parametrize("page", PAGES[1:])
def test_the_commands_of_a_guide(project, demo, data_root, page):
    for command in commands(page):
        run(project, shortened(command), data_root=data_root)
    assert (project / "runs/real_cpu/report.html").exists()  # of the first guide, for all others


def test_the_readme_itself_asks_for_two_commands():
    assert commands("README.md") == ["make demo", "make test"]  # the first is `demo`, the second runs this


@pytest.mark.parametrize(
    ("page", "section"),
    [("TRAINING", ""), ("MODEL", "## Looped models on the Hub")],
    ids=["TRAINING", "MODEL"],
)
def test_the_python_example(project, demo, page, section):
    """After the page's commands, whose folders it reads."""
    text = (ROOT / f"docs/{page}.md").read_text()
    code = re.search(r"```python\n(.*?)```", text[text.index(section) :], flags=re.S)
    assert code
    run(project, f"python -c {shlex.quote(code.group(1))}")


def demo_accuracy(project: Path) -> dict[str, dict]:
    newest = max((project / "runs/demo/eval").glob("results_*.json"))
    return json.loads(newest.read_text())


@pytest.mark.slow
def test_the_demo_at_full_length_learns_level_1(project):
    run(project, "make demo", timeout=1500)
    report = demo_accuracy(project)
    level = report["results"]["causal_loop_level1"]
    score, error = level["exact_match,trace"], level["exact_match_stderr,trace"]
    for name in ("majority", "one_step"):
        baseline = report["baselines"]["causal_loop_level1"][name]
        assert score > baseline["value"] + 0.2
        assert score > baseline["value"] + 3 * error


@pytest.mark.slow
def test_the_real_run_at_full_length(project, data_root):
    # A folder of its own: the shortened command's holds other data.
    output = run(project, "make real REAL_RUN=runs/real_full", timeout=5400, data_root=data_root)
    for task in ("gsm8k", "logiqa", "babi", "arc_easy", "arc_challenge"):
        assert task in output

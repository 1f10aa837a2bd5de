"""Who may import whom: data_pipeline -> pretrain -> checkpoint -> eval, and model under both."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imported where they are used and nowhere else: GPU kernels, and YAML for a command line.
WHERE_USED = {
    "attention_backends.py": {"flash_attn"},
    "moe.py": {"megablocks"},
    "match.py": {"omegaconf", "yaml"},
}
PACKAGES = {"model", "data_pipeline", "pretrain", "distill", "eval", "bench", "experiments"}


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            prefix = path.parent.name if node.level else ""
            module = ".".join(part for part in (prefix, base) if part)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).glob("*.py"))
    assert found
    return found


def test_model_imports_torch_and_safetensors_only():
    for path in files("model"):
        late = WHERE_USED.get(path.name, set())
        assert roots(path) <= {"torch", "safetensors", "model"} | late, path
        for node in ast.parse(path.read_text()).body:  # a backend imports its package when it runs
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not late & {ast.unparse(node).split()[1].split(".")[0]}, path
        assert not any("torch.distributed" in name for name in imported(path)), path


def test_data_pipeline_imports_neither_model_nor_pretrain():
    for path in files("data_pipeline"):
        assert not roots(path) & {"model", "pretrain", "eval", "torch", "deepspeed"}, path


def test_eval_scores_without_the_training_stack():
    allowed = {
        "sources",
        "tokenizer",
        "causal_loop",
        "causal_loop_v2",
        "causal_loop_v2_audit",
        "p_hop",
        "addition",
        "encode",
        "errors",
        "held_out",
        "traced_sources",
    }
    for path in files("eval"):
        assert not roots(path) & {"deepspeed", "pretrain", "omegaconf", "webdataset"}, path
        used = {name.split(".")[1] for name in imported(path) if name.startswith("data_pipeline.")}
        assert used <= allowed, path


def test_transformers_is_for_hugging_face_folders_alone():
    """Imported when one is loaded, so that scores of our own exports do without it."""
    for path in files("eval"):
        if "transformers" in roots(path):
            assert path.name == "hf_folder.py"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "transformers" not in ast.unparse(node), path


def test_the_mark_of_a_position_without_target_is_the_same_on_both_sides():
    """data_pipeline and model may not import each other, so the number stands twice."""
    from data_pipeline.loading.packing import IGNORE_INDEX as WRITTEN
    from model.losses import IGNORE_INDEX as READ

    assert WRITTEN == READ


def test_only_three_files_know_deepspeed():
    known = {"engine.py", "expert_parallel.py", "process_group.py"}
    for package in PACKAGES:
        for path in files(package):
            if "deepspeed" in roots(path):
                assert package == "pretrain", path
                assert path.name in known, path


def test_only_one_function_knows_peft():
    for package in PACKAGES:
        for path in files(package):
            if "peft" in roots(path):
                assert path.name == "lora.py", path
                assert not any(
                    "peft" in ast.unparse(node).split()
                    for node in ast.parse(path.read_text()).body
                    if isinstance(node, ast.Import | ast.ImportFrom)
                ), path


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_import_outside_is_pinned(package):
    pinned = (ROOT / "requirements.txt").read_text().lower()
    if package == "data_pipeline":  # an optional extra
        pinned += (ROOT / "requirements-hf.txt").read_text().lower()
    if package in ("eval", "bench"):  # Hugging Face folders; the bench's peers
        pinned += (ROOT / "requirements-dev.txt").read_text().lower()
    if package in ("eval", "bench"):  # an optional extra
        pinned += (ROOT / "requirements-lmeval.txt").read_text().lower()
    if package == "pretrain":  # an optional extra
        pinned += (ROOT / "requirements-lora.txt").read_text().lower()
    pinned += (ROOT / "requirements-gpu.txt").read_text().lower().replace("-", "_")
    names = {"yaml": "pyyaml"}
    for path in files(package):
        for name in roots(path) - PACKAGES - {beside.stem for beside in files(package)}:
            assert f"{names.get(name, name).replace('_', '-')}==" in pinned.replace("_", "-"), (
                f"{path} imports {name}"
            )

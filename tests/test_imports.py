"""Who may import whom: data_pipeline -> pretrain -> checkpoint -> eval, model under both, common under all.

Every import counts, at any depth of nesting, inside functions and behind TYPE_CHECKING too.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room and the rooms it may import.
ROOMS: dict[str, set[str]] = {
    "common": set(),
    "model": {"common"},
    "data_pipeline": {"common"},
    "pretrain": {"common", "model", "data_pipeline"},
    "distill": {"common", "model", "data_pipeline", "pretrain"},
    "eval": {"common", "model", "data_pipeline"},
    "experiments": {"common", "model", "data_pipeline", "pretrain", "distill", "eval"},
    "bench": {"common", "model", "data_pipeline", "pretrain", "eval"},
}
# Of data_pipeline, what evaluation needs: problems, tasks and tokens, not what builds and loads a corpus.
READ_BY_EVAL = ("errors", "sources", "tasks", "tokenization", "shards.held_out")
# Of data_pipeline, what model/convert/ needs to read texts; the rest of model does without.
READ_BY_CONVERT = ("errors", "tokenization")
# Imported where they are used and nowhere else: GPU kernels, and YAML for a command line.
WHERE_USED = {
    "model/backends/flash.py": {"flash_attn"},
    "model/backends/experts.py": {"megablocks"},
    "model/dense_twin.py": {"omegaconf", "yaml"},
}
REMOTE = "model/hf/remote"  # the classes of transformers that an exported folder takes along
DEEPSPEED = {
    *("engine.py", "building.py", "zero_optimizer.py", "universal.py", "expert_parallel.py"),
    "process_group.py",
}
# The optional extras of a room, beside requirements.txt.
EXTRAS = {
    "model": ["dev"],
    "data_pipeline": ["hf"],
    "pretrain": ["lora"],
    "eval": ["dev", "lmeval"],
    "bench": ["dev", "lmeval"],
}


def files(room: str) -> list[Path]:
    found = sorted(path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py"))
    assert found
    return found


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@cache
def imported(path: Path) -> frozenset[str]:
    """Absolute names of what a file imports: of `from a import b` a.b, and a unless a.b is our own module."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                names |= {inner} if is_module(inner) else {inner, module}
    return frozenset(names)


def is_module(name: str) -> bool:
    """Of this project."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)


def graph() -> dict[str, set[str]]:
    """Modules of all rooms -> the modules that they import. A package is its __init__.py."""
    paths = {module_of(path): path for room in ROOMS for path in files(room)}
    return {module: (imported(path) & paths.keys()) - {module} for module, path in paths.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that need each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            ahead += (new := edges[ahead.pop()] - seen)
            seen |= new
        return seen

    below = {module: reached(module) for module in edges}
    found = {
        tuple(sorted({module} | {other for other in below[module] if module in below[other]}))
        for module in edges
        if module in below[module]
    }
    return [list(group) for group in sorted(found)]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"], ["d"]]


def test_no_two_modules_need_each_other():
    assert circles(graph()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    for path in files(room):
        below = ROOMS[room] | ({"data_pipeline"} if path.is_relative_to("model/convert") else set())
        assert (roots(path) & ROOMS.keys()) - {room} <= below, path


def test_a_package_and_its_modules_are_told_apart():
    edges = graph()
    assert "model" in edges["experiments.groups"]  # from model import ModelConfig
    assert "model.counts" in edges["pretrain.planning.search"]  # from model import counts
    assert "model" not in edges["model.cache"]
    assert "model.transformer" in edges["model"]


def test_nothing_in_the_project_imports_a_test():
    assert not any("tests" in roots(path) for room in ROOMS for path in files(room))


def test_model_imports_torch_and_safetensors_only():
    for path in files("model"):
        late = WHERE_USED.get(path.as_posix(), set())
        beyond = {"data_pipeline"} if path.is_relative_to("model/convert") else set()
        beyond |= {"transformers"} if path.as_posix().startswith(f"{REMOTE}/") else set()
        assert roots(path) <= {"torch", "safetensors", "model", "common"} | late | beyond, path
        for node in ast.parse((ROOT / path).read_text()).body:  # a backend imports its package when it runs
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not late & {ast.unparse(node).split()[1].split(".")[0]}, path
        assert not any("torch.distributed" in name for name in imported(path)), path


def test_the_classes_of_transformers_are_imported_by_their_own_folder_alone():
    needs = {module_of(path) for path in files("model") if "transformers" in roots(path)}
    assert needs
    for room in ROOMS:
        for path in files(room):
            assert path.as_posix().startswith(f"{REMOTE}/") or not imported(path) & needs, path


def test_data_pipeline_does_without_torch_and_deepspeed():
    for path in files("data_pipeline"):
        assert not roots(path) & {"torch", "deepspeed"}, path


def test_eval_scores_without_the_training_stack():
    for path in files("eval"):
        assert not roots(path) & {"deepspeed", "omegaconf", "webdataset"}, path


@pytest.mark.parametrize(("room", "allowed"), [("eval", READ_BY_EVAL), ("model", READ_BY_CONVERT)])
def test_a_room_that_reads_texts_imports_only_their_part_of_data_pipeline(room, allowed):
    for path in files(room):
        for name in imported(path):
            if name.startswith("data_pipeline."):
                parts = tuple(f"data_pipeline.{part}." for part in allowed)
                assert f"{name}.".startswith(parts), f"{path}: {name}"


def test_transformers_is_for_hugging_face_folders_alone():
    """Imported when one is loaded, so that scores of our own exports do without it."""
    for path in files("eval"):
        if "transformers" in roots(path):
            assert path.name == "hf_folder.py"
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "transformers" not in ast.unparse(node), path


def test_the_mark_of_a_position_without_target_is_the_same_on_both_sides():
    """data_pipeline and model may not import each other, so the number is defined twice."""
    from data_pipeline.loading.packing import IGNORE_INDEX as WRITTEN
    from model.losses import IGNORE_INDEX as READ

    assert WRITTEN == READ


def test_only_these_files_know_deepspeed():
    for room in ROOMS:
        for path in files(room):
            if "deepspeed" in roots(path):
                assert room == "pretrain", path
                assert path.name in DEEPSPEED, path


def test_only_one_function_knows_peft():
    for room in ROOMS:
        for path in files(room):
            if "peft" in roots(path):
                assert path.name == "lora.py", path
                assert not any(
                    "peft" in ast.unparse(node).split()
                    for node in ast.parse((ROOT / path).read_text()).body
                    if isinstance(node, ast.Import | ast.ImportFrom)
                ), path


@pytest.mark.parametrize("room", ROOMS)
def test_every_import_from_outside_is_pinned(room):
    lists = ["requirements.txt", "requirements-gpu.txt"]
    lists += [f"requirements-{extra}.txt" for extra in EXTRAS.get(room, [])]
    pinned = "".join((ROOT / name).read_text() for name in lists).lower().replace("_", "-")
    package = {"yaml": "pyyaml", "markdown_it": "markdown-it-py"}
    beside = {path.stem for path in files(room)} if room == "bench" else set()  # scripts in one folder
    for path in files(room):
        for name in roots(path) - ROOMS.keys() - beside:
            assert f"{package.get(name, name).replace('_', '-')}==" in pinned, f"{path} imports {name}"

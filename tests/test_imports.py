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
# Imported where they are used and nowhere else: GPU kernels, and YAML for a command line.
WHERE_USED = {
    "model/backends/attention.py": {"flash_attn"},
    "model/backends/experts.py": {"megablocks"},
    "model/dense_twin.py": {"omegaconf", "yaml"},
}
DEEPSPEED = {"engine.py", "universal.py", "expert_parallel.py", "process_group.py"}
# The optional extras of a room, beside requirements.txt.
EXTRAS = {
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
    """Absolute names of all that a file imports: of `from a import b` both `a` and `a.b`."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


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
    edges = graph()
    # `from package import module` names the package too, whose __init__.py is then not what is meant
    for module, needed in edges.items():
        edges[module] = {n for n in needed if not any(other.startswith(f"{n}.") for other in needed)}
    assert circles(edges) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    for path in files(room):
        assert (roots(path) & ROOMS.keys()) - {room} <= ROOMS[room], path


def test_nothing_in_the_project_imports_a_test():
    assert not any("tests" in roots(path) for room in ROOMS for path in files(room))


def test_model_imports_torch_and_safetensors_only():
    for path in files("model"):
        late = WHERE_USED.get(path.as_posix(), set())
        assert roots(path) <= {"torch", "safetensors", "model", "common"} | late, path
        for node in ast.parse((ROOT / path).read_text()).body:  # a backend imports its package when it runs
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not late & {ast.unparse(node).split()[1].split(".")[0]}, path
        assert not any("torch.distributed" in name for name in imported(path)), path


def test_data_pipeline_does_without_torch_and_deepspeed():
    for path in files("data_pipeline"):
        assert not roots(path) & {"torch", "deepspeed"}, path


def test_eval_scores_without_the_training_stack():
    allowed = tuple(f"data_pipeline.{name}" for name in READ_BY_EVAL)
    for path in files("eval"):
        assert not roots(path) & {"deepspeed", "omegaconf", "webdataset"}, path
        for name in imported(path):
            if name.startswith("data_pipeline."):
                assert f"{name}.".startswith(tuple(f"{part}." for part in allowed)), f"{path}: {name}"


def test_transformers_is_for_hugging_face_folders_alone():
    """Imported when one is loaded, so that scores of our own exports do without it."""
    for path in files("eval"):
        if "transformers" in roots(path):
            assert path.name == "hf_folder.py"
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "transformers" not in ast.unparse(node), path


def test_the_mark_of_a_position_without_target_is_the_same_on_both_sides():
    """data_pipeline and model may not import each other, so the number is written twice."""
    from data_pipeline.loading.packing import IGNORE_INDEX as WRITTEN
    from model.losses import IGNORE_INDEX as READ

    assert WRITTEN == READ


def test_only_four_files_know_deepspeed():
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

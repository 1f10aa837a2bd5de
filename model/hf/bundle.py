"""The code that an exported folder takes along: this project's own modules, as flat files.

transformers copies the files that a file imports by `from .NAME import`, one folder deep, and demands every
package that a file imports outside a `try`. So each module becomes one file, model/config/rope.py
`model_config_rope.py`, and only its import statements are rewritten.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = ("model", "common")
REMOTE = "model.hf.remote"
MODELING, CONFIGURATION = f"{REMOTE}.modeling_zeromodel", f"{REMOTE}.configuration_zeromodel"
INSTALLED = {"torch", "safetensors", "transformers", *sys.stdlib_module_names}


def bundle() -> dict[str, str]:
    """Name -> text of the files; the same for the same code."""
    modules: dict[str, str] = {}
    ahead = [MODELING, CONFIGURATION]
    while ahead:
        module = ahead.pop()
        if module not in modules:
            source = _path(module).read_text()
            modules[module] = _rewritten(module, source)
            ahead += [node.module or "" for node in _own_imports(ast.parse(source))]
    files = {f"{flat_name(module)}.py": text for module, text in sorted(modules.items())}
    if len(files) < len(modules):
        raise AssertionError("two modules have one flat name; rename one")
    return files


def describe(files: dict[str, str]) -> dict[str, str]:
    """What config.json says about the code: the package's version and a hash over all files."""
    digest = hashlib.sha256()
    for name, text in sorted(files.items()):
        digest.update(f"{name}\n{len(text)}\n{text}".encode())
    return {"version": version("zeromodel"), "sha256": digest.hexdigest()}


def flat_name(module: str) -> str:
    """model.config.rope -> model_config_rope; what transformers loads by name keeps its own."""
    if module in (MODELING, CONFIGURATION):
        return module.rpartition(".")[2]
    return module.replace(".", "_")


def _path(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def _own_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [
        node
        for node in _imports(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN
    ]


def _rewritten(module: str, source: str) -> str:
    """A module's text with relative imports of its own project and optional imports of foreign packages.

    Raises:
        AssertionError: an import in a form that transformers would not follow.
    """
    tree, lines = ast.parse(source), source.split("\n")
    own = _own_imports(tree)
    for found in own:
        name = found.module or ""
        if found.level or not _path(name).is_file():
            raise AssertionError(f"{module} has {ast.unparse(found)!r}; write `from the.module import name`")
        line, start = lines[found.lineno - 1], found.col_offset
        after = line[start:].removeprefix(f"from {name} ")
        lines[found.lineno - 1] = f"{line[:start]}from .{flat_name(name)} {after}"
    for node in _imports(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        roots = {name.split(".")[0] for name in names}
        if node in own or roots <= INSTALLED:
            continue
        if node.col_offset == 0 or node.end_lineno != node.lineno or roots & set(OWN):
            raise AssertionError(f"{module} has {ast.unparse(node)!r}, which cannot be taken along")
        indent, statement = " " * node.col_offset, lines[node.lineno - 1].strip()
        optional = ("try:", f"    {statement}", "except ImportError:", "    raise")
        lines[node.lineno - 1] = "\n".join(indent + line for line in optional)
    header = f"# ZeroModel (Apache-2.0): {_path(module).relative_to(ROOT).as_posix()}, as exported.\n"
    return header + "\n".join(lines)

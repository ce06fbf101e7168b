"""The layer map in raynixl/__init__.py is true: imports go downwards only, and heavy ones stay where they belong."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import raynixl

ROOT = Path(raynixl.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
LEVELS = {
    name.strip(): int(level)
    for level, names in re.findall(r"^    L(\d)  ([\w, ]+?)(?:  .*)?$", raynixl.__doc__ or "", re.MULTILINE)
    for name in names.split(",")
}
HEAVY = {  # where each may be imported at all
    "ray": ("actors", "integrations", "bench", "cli"),
    "torch": ("region", "weights", "moe", "actors", "integrations", "compat", "bench", "cli"),
    "ucxx": ("backends/ucx",),
    "cupy": ("region", "backends/nvlink"),
    "obstore": ("backends/object",),
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether that happens when the file is imported."""
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            named = (
                [f"raynixl.{alias.name}" for alias in node.names] if node.module == "raynixl" else [node.module or ""]
            )
            yield from ((name, id(node) not in inside) for name in named)


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to, as the layer map names it."""
    name = [*module.split("."), ""][1]
    return "native" if name == "_native" else name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_layer_and_below(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    own_level = LEVELS["raynixl" if own in ("__init__", "__main__") else own]
    for module, _ in imports(path):
        if module.split(".")[0] == "raynixl" and part_of(module) in LEVELS:
            assert LEVELS[part_of(module)] <= own_level, f"{path.name} (L{own_level}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_only_where_they_belong(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for module, _ in imports(path):
        homes = HEAVY.get(module.split(".")[0])
        assert homes is None or name.startswith(homes), f"{name} imports {module}"


def test_every_part_of_the_package_is_on_the_map() -> None:
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert parts <= set(LEVELS), f"not on the map: {parts - set(LEVELS)}"


def test_only_config_reads_the_environment() -> None:
    readers = {
        path.relative_to(ROOT).as_posix() for path in FILES if re.search(r"\benviron\b|\bgetenv\b", path.read_text())
    }
    assert readers == {"config.py"}

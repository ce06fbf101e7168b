"""The layer map in raynixl/__init__.py is true: imports go downwards only, and heavy ones stay where they belong."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import raynixl

pytestmark = pytest.mark.pure

ROOT = Path(raynixl.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
PARTS = sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES})
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


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = [f"raynixl.{alias.name}" for alias in node.names] if node.module == "raynixl" else []
            yield from whole or [node.module or ""]


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to, as the layer map names it."""
    name = [*module.split("."), ""][1]
    return "native" if name == "_native" else name


@functools.cache
def files_of(part: str) -> list[tuple[str, list[str]]]:
    """The files of a part of the package, and the modules that each imports."""
    paths = [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") == part]
    return [(path.relative_to(ROOT).as_posix(), list(imports(path))) for path in paths]


@pytest.mark.parametrize("part", PARTS)
def test_files_import_only_from_their_layer_and_below(part: str) -> None:
    own_level = LEVELS["raynixl" if part in ("__init__", "__main__") else part]
    wrong = [
        f"{name} (L{own_level}) imports {module}"
        for name, modules in files_of(part)
        for module in modules
        if module.split(".")[0] == "raynixl" and LEVELS.get(part_of(module), 0) > own_level
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", PARTS)
def test_heavy_packages_are_imported_only_where_they_belong(part: str) -> None:
    wrong = [
        f"{name} imports {module}"
        for name, modules in files_of(part)
        for module in modules
        if not name.startswith(HEAVY.get(module.split(".")[0], ("",)))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_of_the_package_is_on_the_map() -> None:
    parts = set(PARTS) - {"__init__", "__main__"}
    assert parts <= set(LEVELS), f"not on the map: {parts - set(LEVELS)}"


def test_only_config_reads_the_environment() -> None:
    readers = {
        path.relative_to(ROOT).as_posix() for path in FILES if re.search(r"\benviron\b|\bgetenv\b", path.read_text())
    }
    assert readers == {"config.py"}

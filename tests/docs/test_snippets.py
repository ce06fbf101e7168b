"""Every Python block of the README and of docs/ runs as it stands, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = {
    f"{page.name}-{number}": text
    for page in PAGES
    for number, text in enumerate(BLOCK.findall(page.read_text("utf-8")), start=1)
}
AS_IF_NEW = """
import runpy, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "raynixl"]:
    del sys.modules[name]
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""In a Python that has imported torch and raynixl: run a file that must import of raynixl what it needs."""


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 6


def starts_python(name: str) -> bool:
    """Whether a snippet starts Ray or processes of its own, which takes a while."""
    return any(one in SNIPPETS[name] for one in ("ray.init", "multiprocessing"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.pure if starts_python(name) else ()) for name in SNIPPETS]
)
def test_a_snippet_runs(name: str, tmp_path: Path, nothing_left: Callable[[], list[str]]) -> None:
    environment = {**os.environ, "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
    file, said = tmp_path / "snippet.py", tmp_path / "stderr"
    file.write_text(SNIPPETS[name], "utf-8")
    with contextlib.chdir(tmp_path), said.open("w") as stderr, open(os.devnull, "w") as stdout:
        if starts_python(name):
            child: Any = subprocess.Popen([sys.executable, str(file)], env=environment, stdout=stdout, stderr=stderr)
        else:
            argv = [sys.executable, "-c", AS_IF_NEW, str(file)]
            child = warm.popen(argv, env=environment, stdout=stdout.fileno(), stderr=stderr.fileno(), torch=True)
    try:
        assert child.wait(150) == 0, said.read_text("utf-8")
    finally:
        child.kill()
    assert "Traceback" not in said.read_text("utf-8")

"""What the README and the pages name exists: links, headings, commands with their options, targets of make, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from raynixl.cli import app

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""(?:\]\(|src=")(?!https?:)([^)"]+)""")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINE = re.compile(r"^(?:\.venv/bin/)?raynixl ([^#\n]+)", re.MULTILINE)
QUOTED = re.compile(r"`(?:\.venv/bin/)?raynixl ([^`]+)`")
FORM = re.compile(r"^-|[\[|]|\.\.\.|MODEL|\bN\b")
"""What is no command but tells how commands look."""
MAKE = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.MULTILINE)
FILE = re.compile(r"`(?:[\w./-]+/)?(\w+\.(?:py|cu|cpp|h))`")
on_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> list[str]:
    """The names by which links reach the headings of a page."""
    headings = HEADING.findall(FENCED.sub("", page.read_text("utf-8")))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def commands(text: str) -> list[str]:
    """The commands of ours that a page shows, without their first word."""
    shown = "\n".join(FENCED.findall(text))
    return [one for one in [*LINE.findall(shown), *QUOTED.findall(FENCED.sub("", text))] if not FORM.search(one)]


def why_refused(words: list[str]) -> str:
    """Say why the command line refuses these words; nothing is run."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        command = command.commands.get(words.pop(0))
    if command is None:
        return "there is no such command"
    try:
        if words:
            command.make_context(command.name, words).close()
    except Exception as exc:
        if not isinstance(exc, click.ClickException) and type(exc).__module__.partition(".")[0] != "typer":
            raise
        return f"{exc!r}"
    return ""


@on_each_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for link in LINK.findall(page.read_text("utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            missing.append(link)
    assert not missing


@on_each_page
def test_commands_are_those_that_the_command_line_takes(page: Path) -> None:
    wrong = [(one, why) for one in commands(page.read_text("utf-8")) if (why := why_refused(shlex.split(one)))]
    assert not wrong


def test_a_wrong_command_is_found() -> None:
    assert commands("```sh\nraynixl fly\n```\n`raynixl plan a --top 1`, `raynixl plan MODEL`\n") == [
        "fly", "plan a --top 1",
    ]  # fmt: skip
    assert why_refused(["fly"])
    assert why_refused(["bench", "transfer", "--op", "steal"])
    assert why_refused(["bench", "moe", "--toks", "1"])
    assert why_refused(["bench", "moe", "--tokens", "1"]) == ""


@on_each_page
def test_targets_of_make_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(MAKE.findall(page.read_text("utf-8"))) - {"it"} <= targets


def test_files_that_the_page_on_the_architecture_names_exist() -> None:
    found = {path.name for part in ("raynixl", "native", "tests", "tools") for path in (ROOT / part).rglob("*.*")}
    assert set(FILE.findall((ROOT / "docs" / "architecture.md").read_text("utf-8"))) - found == set()

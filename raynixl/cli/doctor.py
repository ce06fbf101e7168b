"""`raynixl doctor`: what works on this machine, why the rest does not, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Table

from raynixl.cli.screen import emit, progress, show


class Verdict(enum.StrEnum):
    """What a check found."""

    WORKS = "works"
    SLOW = "slow"
    MISSING = "missing"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what is the case, and what would make it better."""

    area: str
    name: str
    verdict: Verdict
    detail: str
    hint: str = ""


_STYLES = {Verdict.WORKS: "green", Verdict.SLOW: "yellow", Verdict.MISSING: "dim", Verdict.FAILS: "bold red"}


def run_doctor(*, is_json: bool) -> bool:
    """Examine, print, and return whether any backend works."""
    with progress("looking", 0):
        findings = list(examine())
    works = any(one.area == "backend" and one.verdict is Verdict.WORKS for one in findings)
    if is_json:
        emit({"doctor": "raynixl", "works": works, "findings": [asdict(one) for one in findings]})
    else:
        show(_table(findings))
    return works


def examine() -> Iterator[Finding]:
    """Yield every finding, cheapest first."""
    from raynixl.cli import gpu_checks, host_checks, path_checks, ucx_checks

    yield from host_checks.check_versions()
    yield from host_checks.check_limits()
    yield from host_checks.check_huge_pages()
    yield from path_checks.check_core()
    yield from ucx_checks.check_ucx()
    yield from gpu_checks.check_gpus()
    yield from path_checks.check_backends()
    yield from host_checks.check_ray()


def _table(findings: list[Finding]) -> Table:
    table = Table(title="raynixl doctor", title_justify="left", header_style="bold")
    for heading in ("area", "what", "verdict", "detail"):
        table.add_column(heading, overflow="fold")
    area = ""
    for one in findings:
        if area and one.area != area:
            table.add_section()
        verdict = f"[{_STYLES[one.verdict]}]{one.verdict}[/]"
        detail = one.detail + (f"\n[italic]{one.hint}[/]" if one.hint else "")
        table.add_row(one.area if one.area != area else "", one.name, verdict, detail)
        area = one.area
    return table

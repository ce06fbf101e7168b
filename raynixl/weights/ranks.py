"""Ranks: what whoever pushes does alike with sources and with targets: read their answers, and fetch their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from raynixl.errors import ConfigError, IntegrityError, RaynixlError
from raynixl.weights.table import Table

if TYPE_CHECKING:
    from raynixl.agents import Agent

T = TypeVar("T")
Answers = Mapping[str, bytes | RaynixlError]
Errors = dict[str, RaynixlError]


def incarnation_of(agent: Agent, name: str) -> str:
    """Return the incarnation of a rank that we are connected to, or ''."""
    connection = agent.connector.current(name)
    return "" if connection is None or connection.lost is not None else connection.incarnation


def parsed(answers: Answers, parse: Callable[[bytes], T]) -> tuple[dict[str, T], Errors]:
    """Return what ranks answered, and why others did not."""
    well: dict[str, T] = {}
    failed: Errors = {}
    for name, answer in answers.items():
        try:
            if isinstance(answer, RaynixlError):
                failed[name] = answer
            else:
                well[name] = parse(answer)
        except IntegrityError as exc:
            failed[name] = IntegrityError(f"{name!r} answered nonsense: {exc.message}", hint=exc.hint, peer=name)
    return well, failed


def fetch_tables(
    known: dict[str, Table], wanted: Mapping[str, str], ask: Callable[[Mapping[str, bytes]], Answers]
) -> Errors:
    """Fetch tables that are not `known`, each from a rank that names it in `wanted`; return ranks left without."""
    failed: Errors = {}
    while True:
        first: dict[str, str] = {}
        for name, digest in wanted.items():
            if digest not in known and name not in failed:
                first.setdefault(digest, name)
        if not first:
            return failed
        tables, errors = parsed(ask({name: digest.encode() for digest, name in first.items()}), Table.from_bytes)
        failed |= errors
        for name, table in tables.items():
            if table.digest == wanted[name]:
                known[table.digest] = table
            else:
                failed[name] = ConfigError(f"{name!r} sent another table than it named", peer=name)

"""Explanations: which backend carries a transfer, by which path, and why the others do not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl.agents.binder import kind_names, refusal
from raynixl.agents.prepared import Prepared
from raynixl.agents.selections import Selections, as_list
from raynixl.backends.base import Binding, Describes, NamesPaths, Op
from raynixl.region import Region

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent


@dataclass(frozen=True, slots=True)
class Explanation:
    """What carries a transfer and why; `str` of it is for people."""

    op: str
    peer: str
    nbytes: int
    blocks: int
    kinds: str
    backend: str
    paths: tuple[str, ...]
    core: str
    rejected: tuple[tuple[str, str], ...]
    detail: str = ""
    """What the backend says besides of its path, a line for each thing it says; '' if nothing."""

    def __str__(self) -> str:
        lines = [
            f"{self.op} of {self.nbytes} bytes in {self.blocks} blocks with {self.peer!r} ({self.kinds})",
            f"  taken: {self.backend}, path {' + '.join(self.paths)}, {self.core} core",
        ]
        lines += [f"  {line}" for line in self.detail.splitlines()]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def explain(agent: Agent, src: Selections, dst: Selections) -> Explanation:
    """Resolve and bind the transfer without posting it, and say how it would go.

    Raises:
        RaynixlError: whatever would stand in its way.
    """
    first = as_list(src)[0]
    op = Op.WRITE if isinstance(getattr(first, "region", first), Region) else Op.READ
    plan = Prepared(agent, op, src, dst)
    bindings = agent.connector.bind(plan, time.monotonic() + agent.config.connect_timeout)
    kinds = plan.kinds()
    rejected = []
    is_later = False
    for backend in agent.backends:
        if is_later or backend.name == plan.backend:
            if is_later:
                rejected.append((backend.name, "comes later in preference"))
            is_later = True
            continue
        reasons = [refusal(backend, remote, kinds) for remote in plan.remote]
        record = agent.find(plan.peer)
        reason = next((text for text in reasons if text), "") or (backend.reaches(record) if record else "")
        connection = agent.connector.current(plan.peer)
        if connection is not None and not reason:
            reason = next((text for one in plan.remote if (text := connection.why_refused(one, backend.name))), "")
        rejected.append((backend.name, reason or "refused to bind the region"))
    return Explanation(
        op=op.value, peer=plan.peer, nbytes=plan.nbytes, blocks=plan.count, kinds=kind_names(kinds),
        backend=plan.backend, paths=_paths(agent, plan, bindings),
        core=agent.native_name, rejected=tuple(dict.fromkeys(rejected)), detail=_detail(agent, plan, bindings),
    )  # fmt: skip


def _paths(agent: Agent, plan: Prepared, bindings: Sequence[Binding]) -> tuple[str, ...]:
    """Return the paths inside the backend, everything once."""
    backend = agent.backend(plan.backend)
    if not isinstance(backend, NamesPaths):
        return tuple(dict.fromkeys(binding.path for binding in bindings))
    return tuple(dict.fromkeys(backend.path(local, binding) for local in plan.local for binding in bindings))


def _detail(agent: Agent, plan: Prepared, bindings: Sequence[Binding]) -> str:
    """Return what the backend has to say of each pair of regions, everything once."""
    backend = agent.backend(plan.backend)
    if not isinstance(backend, Describes):
        return ""
    said = [backend.describe(local, binding) for local in plan.local for binding in bindings]
    return "\n".join(dict.fromkeys(text for text in said if text))

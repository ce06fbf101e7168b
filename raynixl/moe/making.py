"""Making: the expert-parallel object of a group, flat or in two stages, whichever is predicted to be faster."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe.checks import dtype_of, positive
from raynixl.moe.cost import Choice, Fabric, Shape, Topology, choose
from raynixl.moe.council import PATIENCE, Council
from raynixl.moe.fields import RowFormat
from raynixl.moe.grid import make_grid
from raynixl.moe.meeting import Meeting
from raynixl.moe.parallel import ExpertParallel
from raynixl.moe.placement import Placement
from raynixl.moe.two_level import TwoLevel
from raynixl.moe.view import Ask
from raynixl.moe.whereabouts import hosts_of

if TYPE_CHECKING:
    from raynixl.collectives import Group

AUTO = "auto"


def expert_parallel(
    group: Group, *, topology: str = AUTO, fabric: Fabric | None = None, **options: Any
) -> ExpertParallel | TwoLevel:
    """Make this rank's `ExpertParallel`, or `TwoLevel`; every member calls it with the same arguments.

    topology: "flat", "two-level", or "auto": by where the members are and what full dispatches of `max_tokens` would
    take on `fabric`; who comes back to members that run takes their topology. options: those of the class; those that
    only one has are refused by the other.

    Raises:
        ConfigError: there is no such topology, or the options make no sense.
        TransferTimeout: not all members came.
    """
    if topology not in (AUTO, *(each.value for each in Topology)):
        raise ConfigError(f"there is no topology {topology!r:.40}", hint="known are auto, flat and two-level")
    chosen = topology
    if topology == AUTO:
        shape = _shape_options(options)
        running = running_topology(group, str(options.get("name", "moe")))
        chosen = (predict_for(group, fabric=fabric, **shape).topology if running is None else running).value
    return TwoLevel(group, **options) if chosen == Topology.TWO_LEVEL.value else ExpertParallel(group, **options)


def running_topology(group: Group, name: str) -> Topology | None:
    """Ask the other members whether they run a layer of this name already; those that begin with us do not."""
    token = secrets.token_hex(16)
    asks = {
        Topology.TWO_LEVEL: (Council.topic(name), Ask(kind="state", rank=group.rank, token=token).to_bytes()),
        Topology.FLAT: (Meeting.topic(name, "placement"), b""),
    }
    for member in group.members:
        for topology, (topic, payload) in asks.items():
            try:
                if member != group.agent.name:
                    group.agent.peer(member).ask(topic, payload, timeout=PATIENCE).wait()
                    return topology
            except RaynixlError:
                continue  # it is not there, or runs no such layer
    return None


def predict_for(
    group: Group, *, experts: int, hidden: int, topk: int, tokens: int, dtype: torch.dtype = torch.bfloat16,
    placement: Placement | Sequence[int] | None = None, fabric: Fabric | None = None,
) -> Choice:  # fmt: skip
    """Predict what a dispatch of so many tokens a rank and its combine take in this group, by the hosts of its members.

    All members call it alike, and learn alike.
    """
    hosts = hosts_of(group)
    given = Placement.even(positive(experts, "experts"), group.world) if placement is None else placement
    holders = given.holders if isinstance(given, Placement) else given
    row = positive(hidden, "hidden") * dtype_of(dtype).itemsize
    beside = sum(RowFormat((4 * topk, 4 * topk, 4)).fields)
    shape = Shape(
        positive(tokens, "tokens"), positive(topk, "topk"), [max(0, one) for one in holders], row + beside, row
    )
    return choose(make_grid(group.world, hosts), shape, hosts, fabric)


def _shape_options(options: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in ("experts", "hidden", "topk", "max_tokens") if name not in options]
    if missing:
        raise ConfigError(f"an expert-parallel group without {', '.join(missing)}", hint="give them on every rank")
    named: dict[str, Any] = {
        name: options[name] for name in ("experts", "hidden", "topk", "dtype", "placement") if name in options
    }
    return {**named, "tokens": options["max_tokens"]}

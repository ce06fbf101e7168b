"""What ranks in processes of their own are told to do, by name; see `moe_tools.Processes.call`."""

from __future__ import annotations

from typing import Any

from moe_programs import Program, play


def play_layer(member: Any, program: Program, layer: str) -> list[Any]:
    """Do this rank's part of a program on a layer."""
    return play(program, member.rank, member.eps[layer], member.groups[layer])

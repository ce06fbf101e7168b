"""How the members of a group are spread over hosts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from raynixl.moe.grid import by_host

if TYPE_CHECKING:
    from raynixl.collectives import Group


def hosts_of(group: Group) -> list[int]:
    """Ask every member for its host; return a number for each, alike for those of one host. All members call it.

    Raises:
        PeerLost, PeerRestarted, TransferTimeout: as the group's operations do.
    """
    digest = hashlib.blake2b(group.agent.host.encode(), digest_size=8).digest()
    mine, every = np.frombuffer(digest, np.uint64).copy(), np.zeros(group.world, np.uint64)
    group.allgather(mine, every)
    numbers = {rank: number for number, ranks in enumerate(by_host(every.tolist())) for rank in ranks}
    return [numbers[rank] for rank in range(group.world)]

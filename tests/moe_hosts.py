"""Crews of ranks that are spread over the hosts of a bed."""

from __future__ import annotations

from typing import Any

from hosts_tools import Bed, Host, environment
from moe_tools import CHILD, Processes
from weights_nursery import Nursery

SECRET = "of the hosts"


class Nurseries:
    """A nursery on each host; a rank's children are born on its own."""

    def __init__(self, hosts: list[Host], settings: dict[str, str]) -> None:
        self._made: dict[str, Nursery] = {}
        self._homes = {f"rank{rank}": host.name for rank, host in enumerate(hosts)}
        given = environment(RAYNIXL_SECRET=SECRET, **settings)
        try:
            for host in hosts:
                if host.name not in self._made:
                    self._made[host.name] = Nursery(CHILD, launch=host.run_warm, environment=given)
        except BaseException:
            self.close()
            raise

    def child(self, label: str) -> Any:
        """Fork a child where its rank lives."""
        return self._made[self._homes[label.partition("+")[0]]].child(label)

    def close(self) -> None:
        """End all."""
        for nursery in self._made.values():
            nursery.close()


class Spread(Processes):
    """Ranks on the hosts of a bed, `ranks` of them on each host in turn: shm inside of a host, ucx between."""

    def __init__(self, bed: Bed, ranks: int, **settings: str) -> None:
        self.bed = bed
        self.homes = [host for host in bed for _ in range(ranks)]
        super().__init__(len(self.homes), backends=("shm", "ucx"), nursery=Nurseries(self.homes, settings))

"""Which network devices are near a piece of memory, and which of them should carry its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile

from raynixl.topology.devices import Nic, NicKind
from raynixl.topology.places import Place


class Distance(IntEnum):
    """How far a device is from memory, nearest first."""

    SAME_SWITCH = 0
    SAME_ROOT = 1
    SAME_NODE = 2
    OTHER_NODE = 3
    UNKNOWN = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The UCX names of the devices that should carry some memory's bytes; none leaves it to UCX. And why."""

    devices: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{', '.join(self.devices) or 'no device named'}: {self.reason}"


def distance(nic: Nic, place: Place) -> Distance:
    """Return how far a device is from a place: by the PCI tree where both are in it, else by their NUMA nodes."""
    shared = _shared(nic, place)
    if shared > 1:
        return Distance.SAME_SWITCH
    apart = -1 not in (nic.numa_node, place.numa_node)
    if shared == 1 and not (apart and nic.numa_node != place.numa_node):  # a virtual machine may have one root for all
        return Distance.SAME_ROOT
    if not apart:
        return Distance.UNKNOWN
    return Distance.SAME_NODE if nic.numa_node == place.numa_node else Distance.OTHER_NODE


def _shared(nic: Nic, place: Place) -> int:
    """Count what the ways to both have in common: the host bridge, then root port and switches."""
    ways = zip(nic.pci_path.split("/"), place.pci_path.split("/"), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] != "", ways))


def nearest(nics: Sequence[Nic], place: Place) -> Choice:
    """Choose the devices for a place: the nearest active RDMA ports that are equally near and equally fast.

    Several are rails. None are named where there is no RDMA, or where several are at a distance that is not known:
    then UCX chooses. Give only devices that UCX can open: a container sees in sysfs those of others, too.
    """
    usable = [nic for nic in nics if nic.kind is NicKind.RDMA and nic.is_active]
    if not usable:
        return Choice((), _none_active(nics))
    # A port for management is no rail, however near: to cross between sockets costs half the speed at most.
    fastest = max(nic.speed_gbps for nic in usable)
    fast = [nic for nic in usable if 2 * nic.speed_gbps >= fastest]
    if len(fast) == 1:
        return Choice((fast[0].device,), _only(fast[0], usable))
    best = min(_order(nic, place) for nic in fast)
    chosen = [nic for nic in fast if _order(nic, place) == best]
    far = distance(chosen[0], place)
    if far is Distance.UNKNOWN:
        return Choice((), f"how far {_listed(fast)} are from {place.name} is not known; UCX chooses")
    return Choice(tuple(nic.device for nic in chosen), _reason(far, chosen[0], place))


def _order(nic: Nic, place: Place) -> tuple[Distance, int, float, bool, str]:
    """Return what rails must have in common, better ones first; the last two since no rails lie in two fabrics."""
    is_foreign = nic.link_layer != "InfiniBand"
    return distance(nic, place), -_shared(nic, place), -nic.speed_gbps, is_foreign, nic.link_layer


def _reason(far: Distance, nic: Nic, place: Place) -> str:
    match far:
        case Distance.SAME_SWITCH:
            return f"behind the same PCIe switch as {place.name}"
        case Distance.SAME_ROOT:
            return f"at the same PCIe root complex as {place.name}"
        case Distance.SAME_NODE:
            return f"NUMA node {nic.numa_node} as {place.name}"
        case _:
            return f"NUMA node {nic.numa_node}, {place.name} is at node {place.numa_node}; none is nearer"


def _none_active(nics: Sequence[Nic]) -> str:
    down = [nic for nic in nics if nic.kind is NicKind.RDMA]
    state = f" ({_listed(down)} {'is' if len(down) == 1 else 'are'} down)" if down else ""
    others = [nic for nic in nics if nic.kind is NicKind.ETHERNET and nic.is_active]
    return f"no active RDMA device{state}; UCX chooses" + (f" among {_listed(others)}" if others else "")


def _only(nic: Nic, usable: Sequence[Nic]) -> str:
    slow = [one for one in usable if one is not nic]
    if not slow:
        return "the only active RDMA device"
    return f"at {nic.speed_gbps:g} Gb/s more than twice as fast as {_listed(slow)}"


def _listed(nics: Sequence[Nic]) -> str:
    return ", ".join(nic.device for nic in nics)

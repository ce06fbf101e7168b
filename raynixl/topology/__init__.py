"""Where this host's interfaces, network devices and memory are, and which of them are near each other.

Facts come from getifaddrs, sysfs and move_pages and are values; choices are pure functions of them.
"""

from __future__ import annotations

from raynixl.topology.devices import Nic, NicKind, gpu_pci_path, gpu_place, nics
from raynixl.topology.interfaces import Address, addresses, by_nearness, parse_address, same_subnet
from raynixl.topology.nearness import Choice, Distance, distance, nearest
from raynixl.topology.places import Place, memory_place, numa_node_of
from raynixl.topology.stripes import Stripes, stripe

__all__ = [
    "Address",
    "Choice",
    "Distance",
    "Nic",
    "NicKind",
    "Place",
    "Stripes",
    "addresses",
    "by_nearness",
    "distance",
    "gpu_pci_path",
    "gpu_place",
    "memory_place",
    "nearest",
    "nics",
    "numa_node_of",
    "parse_address",
    "same_subnet",
    "stripe",
]

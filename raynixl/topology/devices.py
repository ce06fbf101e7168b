"""The network devices of this host as sysfs shows them: RDMA ports and Ethernet interfaces, by their names in UCX."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from raynixl.topology.places import Place

_SYS: Final = Path("/sys")
_BUS_ID: Final = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_ROOT: Final = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_RATE: Final = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) Gb/sec")
_FILE_NBYTES: Final = 4096  # of a sysfs attribute, at most
_FASTEST_GBPS: Final = 1e6


class NicKind(Enum):
    """How a device moves bytes: by itself, or through the kernel's sockets."""

    RDMA = "RDMA"
    ETHERNET = "Ethernet"


@dataclass(frozen=True, slots=True)
class Nic:
    """One port of a network device.

    `device` is UCX's name for it ("mlx5_0:1", "eth0"); `link_layer` is "InfiniBand" or "Ethernet" (RoCE for an RDMA
    device). Node -1, path '' and speed 0 mean not known.
    """

    device: str
    kind: NicKind
    is_active: bool
    link_layer: str = "Ethernet"
    numa_node: int = -1
    pci_path: str = ""
    speed_gbps: float = 0.0


def nics(root: Path = _SYS) -> list[Nic]:
    """Return the RDMA ports and the Ethernet interfaces of this host, those that are down included.

    Interfaces without hardware below them (lo, bridges of containers, veth) are listed only where nothing else is;
    members of a bond or bridge never, since addresses belong to the bond. What cannot be read is not known.
    """
    return [*_rdma(root / "class/infiniband"), *_ethernet(root / "class/net")]


def _rdma(root: Path) -> list[Nic]:
    return [
        Nic(
            device=f"{name}:{port}",
            kind=NicKind.RDMA,
            is_active=_read(root / name / "ports" / port / "state").partition(":")[2].strip() == "ACTIVE",
            link_layer=_read(root / name / "ports" / port / "link_layer"),
            numa_node=_node(root / name / "device"),
            pci_path=_pci_path(root / name / "device"),
            speed_gbps=_rate(_read(root / name / "ports" / port / "rate")),
        )
        for name in _names(root)
        for port in _names(root / name / "ports")
    ]


def _ethernet(root: Path) -> list[Nic]:
    names = [name for name in _names(root) if (root / name / "operstate").exists()]  # bonding_masters is a file
    free = [name for name in names if not os.path.lexists(root / name / "master")]
    real = [name for name in free if _hardware(root, name)]
    virtual = [name for name in free if name != "lo"]
    return [_interface(root, name) for name in real or virtual or free]


def _interface(root: Path, name: str) -> Nic:
    below = [root / one / "device" for one in _hardware(root, name)]
    nodes, paths = {_node(one) for one in below}, {_pci_path(one) for one in below}
    return Nic(
        device=name,
        kind=NicKind.ETHERNET,
        is_active=_read(root / name / "operstate") in ("up", "unknown"),  # unknown: the driver does not say (lo, tun)
        numa_node=nodes.pop() if len(nodes) == 1 else -1,
        pci_path=paths.pop() if len(paths) == 1 else "",
        speed_gbps=max(0, _integer(_read(root / name / "speed"), -1)) / 1000,  # in Mb/s; -1 if not known
    )


def _hardware(root: Path, name: str, depth: int = 4) -> list[str]:
    """Return the interfaces with hardware that one stands on: itself, or the members of a bond, VLAN or bridge."""
    if (root / name / "device").exists():
        return [name]
    if depth == 0:
        return []
    lower = [one.removeprefix("lower_") for one in _names(root / name) if one.startswith("lower_")]
    return sorted({real for one in lower for real in _hardware(root, one, depth - 1)})


def gpu_pci_path(bus_id: str, root: Path = _SYS) -> str:
    """Return the way to a GPU through the PCI tree, '' if not known; `bus_id` as CUDA or NVML write it."""
    return _pci_path(_gpu(bus_id, root))


def gpu_place(bus_id: str, *, name: str, root: Path = _SYS) -> Place:
    """Return the place of a GPU's memory; `name` is how people call it, such as "GPU 3"."""
    device = _gpu(bus_id, root)
    return Place(name, _node(device), _pci_path(device))


def _gpu(bus_id: str, root: Path) -> Path:
    """Return the sysfs directory of a bus id: "0000:3B:00.0", or NVML's with a domain of eight digits."""
    match = _BUS_ID.fullmatch(bus_id.strip().lower())
    if match is None:
        return root / "bus/pci/devices/unknown"
    domain, bus, device, function = match.groups()
    return root / "bus/pci/devices" / f"{int(domain, 16):04x}:{bus}:{device}.{function}"


def _pci_path(device: Path) -> str:
    """Return the host bridge and the bridges down to a device: "pci0000:00/0000:00:01.0/0000:01:00.0"."""
    if not device.exists():
        return ""
    parts = os.path.realpath(device).split("/")
    roots = [i for i, part in enumerate(parts) if _ROOT.fullmatch(part)]
    if not roots:
        return ""
    way = [part for part in parts[roots[-1] + 1 :] if _BUS_ID.fullmatch(part)]  # a virtio device hangs below its own
    return "/".join([parts[roots[-1]], *way])


def _node(device: Path) -> int:
    """Return the NUMA node of a device: its own, or that of the PCI device which it hangs below (virtio)."""
    for one in (device, Path(os.path.realpath(device)).parent):
        node = _integer(_read(one / "numa_node"), -1)
        if 0 <= node < 1024:
            return node
    return -1


def _rate(text: str) -> float:
    match = _RATE.match(text)  # "400 Gb/sec (4X NDR)"
    speed = float(match[1]) if match else 0.0
    return speed if math.isfinite(speed) and speed <= _FASTEST_GBPS else 0.0


def _integer(text: str, default: int) -> int:
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else default


def _read(path: Path) -> str:
    """Return a file's text, '' if it cannot be read: attributes of a device that is down fail with EINVAL."""
    try:
        with path.open("rb") as file:
            return file.read(_FILE_NBYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def _names(path: Path) -> list[str]:
    """Return a directory's entries, numbers in their order; none if it cannot be read."""
    try:
        found = os.listdir(path)
    except OSError:
        return []
    return sorted(found, key=_natural)


def _natural(name: str) -> list[str | int]:
    """Return what sorts mlx5_10 behind mlx5_9."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]

"""Fake trees of /sys, laid out as the kernel lays them out: devices in the PCI tree, classes as links to them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FakeSys:
    """A tree below a directory of the test."""

    root: Path

    def pci(self, way: str, *, node: int | str = -1) -> Path:
        """Make a PCI device at a way such as "pci0000:00/0000:00:01.0/0000:01:00.0"."""
        device = self.root / "devices" / way
        device.mkdir(parents=True, exist_ok=True)
        (device / "numa_node").write_text(f"{node}\n")
        self.link(self.root / "bus/pci/devices" / device.name, device)
        return device

    def rdma(self, name: str, device: Path, *, state: str = "4: ACTIVE", layer: str = "InfiniBand", rate: str) -> None:
        """Make an RDMA device with one port."""
        port = device / "infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        for attribute, text in (("state", state), ("link_layer", layer), ("rate", rate)):
            (port / attribute).write_text(f"{text}\n")
        self.link(device / "infiniband" / name / "device", device)
        self.link(self.root / "class/infiniband" / name, device / "infiniband" / name)

    def net(self, name: str, device: Path | None = None, *, state: str = "up", speed: str = "1000") -> Path:
        """Make an interface, virtual if it has no device."""
        place = self.root / "devices/virtual/net" / name if device is None else device / "net" / name
        place.mkdir(parents=True)
        (place / "operstate").write_text(f"{state}\n")
        (place / "speed").write_text(f"{speed}\n")
        if device is not None:
            self.link(place / "device", device)
        self.link(self.root / "class/net" / name, place)
        return place

    def link(self, link: Path, target: Path) -> None:
        """Make a relative link, as sysfs has them."""
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))

    def stack(self, upper: str, lower: str, *, enslave: bool) -> None:
        """Put one interface on top of another: a VLAN, or a bond or bridge whose member the other becomes."""
        above, below = ((self.root / "class/net" / name).resolve() for name in (upper, lower))
        self.link(above / f"lower_{lower}", below)
        if enslave:
            self.link(below / "master", above)


def dgx(root: Path) -> FakeSys:
    """Eight GPUs, each behind a PCIe switch with a 400 Gb/s NIC; two sockets; storage and management ports besides."""
    fake = FakeSys(root)
    for i in range(8):
        node, switch = i // 4, f"pci0000:{i + 1:x}0/0000:{i + 1:x}0:01.0/0000:{i + 1:x}1:00.0"
        fake.rdma(f"mlx5_{i}", fake.pci(f"{switch}/0000:{i + 1:x}2:00.0/0000:{i + 1:x}3:00.0", node=node), rate=NDR)
        fake.pci(f"{switch}/0000:{i + 1:x}2:01.0/0000:{i + 1:x}4:00.0", node=node)
    storage = fake.pci("pci0000:a0/0000:a0:01.0/0000:a1:00.0", node=0)
    fake.rdma("mlx5_8", storage, layer="Ethernet", rate="100 Gb/sec (4X EDR)")
    fake.net("ens8", storage, speed="100000")
    fake.net("lo", state="unknown")
    fake.net("docker0", state="down")
    return fake


def dgx_gpu(i: int) -> str:
    """The bus id of GPU `i` of that host, as NVML writes it."""
    return f"00000000:{i + 1:X}4:00.0"


NDR = "400 Gb/sec (4X NDR)"

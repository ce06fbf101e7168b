"""Devices are chosen near the memory, and the choice is explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sysfs_tools import NDR, FakeSys, dgx, dgx_gpu

from raynixl.topology import Choice, Distance, Nic, NicKind, Place, distance, gpu_place, nearest, nics

SWITCH = "pci0000:10/0000:10:01.0/0000:11:00.0"


def port(name: str, *, node: int = -1, way: str = "", gbps: float = 400.0, active: bool = True) -> Nic:
    return Nic(f"{name}:1", NicKind.RDMA, active, "InfiniBand", node, way, gbps)


@pytest.mark.parametrize(
    ("nic", "place", "expected"),
    [
        (
            port("a", way=f"{SWITCH}/0000:12:00.0/0000:13:00.0"),
            Place(pci_path=f"{SWITCH}/0000:12:01.0/0000:14:00.0"),
            0,
        ),
        (port("a", way="pci0000:10/0000:10:01.0", node=0), Place(pci_path="pci0000:10/0000:10:02.0", numa_node=0), 1),
        (port("a", way="pci0000:10/0000:10:01.0"), Place(pci_path="pci0000:10/0000:10:02.0"), 1),
        # The only root of a virtual machine, which says that they are at different nodes.
        (port("a", way="pci0000:10/0000:10:01.0", node=0), Place(pci_path="pci0000:10/0000:10:02.0", numa_node=1), 3),
        (port("a", way="pci0000:10/0000:10:01.0", node=1), Place(pci_path="pci0000:20/0000:20:02.0", numa_node=1), 2),
        (port("a", way="pci0000:10/0000:10:01.0", node=1), Place(numa_node=1), 2),
        (port("a", node=1), Place(numa_node=0), 3),
        (port("a", node=1), Place(), 4),
        (port("a", way="pci0000:10/0000:10:01.0"), Place(numa_node=0), 4),
        (port("a"), Place(), 4),
    ],
)
def test_distance(nic: Nic, place: Place, expected: int) -> None:
    assert distance(nic, place) == Distance(expected)


@pytest.mark.parametrize("i", range(8))
def test_each_gpu_gets_the_nic_behind_its_switch(tmp_path: Path, i: int) -> None:
    dgx(tmp_path)
    choice = nearest(nics(tmp_path), gpu_place(dgx_gpu(i), name=f"GPU {i}", root=tmp_path))
    assert str(choice) == f"mlx5_{i}:1: behind the same PCIe switch as GPU {i}"


@pytest.mark.parametrize("node", [0, 1])
def test_host_memory_gets_the_fast_nics_of_its_node_as_rails(tmp_path: Path, node: int) -> None:
    dgx(tmp_path)
    names = tuple(f"mlx5_{i}:1" for i in range(4 * node, 4 * node + 4))
    assert nearest(nics(tmp_path), Place(numa_node=node)) == Choice(names, f"NUMA node {node} as the memory")


def test_two_sockets_with_a_nic_each(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    fake.rdma("mlx5_0", fake.pci("pci0000:00/0000:00:01.0/0000:01:00.0", node=0), rate=NDR)
    fake.rdma("mlx5_1", fake.pci("pci0000:80/0000:80:01.0/0000:81:00.0", node=1), rate=NDR)
    found = nics(tmp_path)
    assert nearest(found, Place(numa_node=1)).devices == ("mlx5_1:1",)
    down = [replace(found[0], is_active=False), found[1]]
    assert str(nearest(down, Place(numa_node=0))) == "mlx5_1:1: the only active RDMA device"


def test_what_is_far_is_said_to_be_far() -> None:
    ports = [port("a", node=1), port("b", node=1)]
    assert str(nearest(ports, Place(numa_node=0))) == ("a:1, b:1: NUMA node 1, the memory is at node 0; none is nearer")


def test_the_nearer_of_two_behind_one_tree_of_switches_is_taken() -> None:
    ports = [
        port("far", way=f"{SWITCH}/0000:12:00.0/0000:13:00.0/0000:14:00.0/0000:15:00.0"),
        port("near", way=f"{SWITCH}/0000:12:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0"),
    ]
    gpu = Place("GPU 0", pci_path=f"{SWITCH}/0000:12:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.0")
    assert nearest(ports, gpu).devices == ("near:1",)


def test_a_slow_port_is_no_rail_however_near() -> None:
    ports = [port("management", node=0, gbps=25), port("a", node=1), port("b", node=1)]
    assert nearest(ports, Place(numa_node=0)).devices == ("a:1", "b:1")
    assert str(nearest(ports[:2], Place(numa_node=0))) == "a:1: at 400 Gb/s more than twice as fast as management:1"


def test_rails_are_equally_fast_and_of_one_fabric() -> None:
    ports = [port("a", node=0), port("b", node=0, gbps=200), replace(port("c", node=0), link_layer="Ethernet")]
    assert nearest(ports, Place(numa_node=0)).devices == ("a:1",)


def test_at_distances_that_are_not_known_ucx_chooses() -> None:
    choice = nearest([port("a"), port("b")], Place(numa_node=0))
    assert choice == Choice((), "how far a:1, b:1 are from the memory is not known; UCX chooses")
    assert nearest([port("a")], Place()).devices == ("a:1",)


def test_without_rdma_ucx_chooses() -> None:
    ethernet = Nic("eth0", NicKind.ETHERNET, is_active=True)
    assert str(nearest([ethernet], Place())) == "no device named: no active RDMA device; UCX chooses among eth0"
    assert nearest([port("a", active=False)], Place()).reason == "no active RDMA device (a:1 is down); UCX chooses"
    assert nearest([], Place()).devices == ()


ways = st.sampled_from(["", "pci0000:00/0000:00:01.0", f"{SWITCH}/0000:12:00.0/0000:13:00.0", f"{SWITCH}/0000:12:01.0"])
any_nic = st.builds(
    Nic,
    device=st.from_regex(r"[a-z]{1,6}_[0-9]:1", fullmatch=True),
    kind=st.sampled_from(NicKind),
    is_active=st.booleans(),
    link_layer=st.sampled_from(["InfiniBand", "Ethernet", ""]),
    numa_node=st.integers(-1, 2),
    pci_path=ways,
    speed_gbps=st.sampled_from([0.0, 10.0, 100.0, 200.0, 400.0]),
)
any_place = st.builds(Place, numa_node=st.integers(-1, 2), pci_path=ways)


@given(st.lists(any_nic, max_size=8, unique_by=lambda nic: nic.device), any_place)
def test_rails_are_active_and_equal_and_none_as_fast_is_nearer(found: list[Nic], place: Place) -> None:
    choice = nearest(found, place)
    assert choice.reason
    chosen = [nic for nic in found if nic.device in choice.devices]
    assert len(chosen) == len(choice.devices)
    assert all(nic.is_active and nic.kind is NicKind.RDMA for nic in chosen)
    assert len({(distance(nic, place), nic.speed_gbps, nic.link_layer) for nic in chosen}) <= 1
    for nic in chosen[:1]:
        rivals = [one for one in found if one.is_active and one.kind is NicKind.RDMA]
        assert all(distance(one, place) >= distance(nic, place) for one in rivals if one.speed_gbps >= nic.speed_gbps)


@given(st.permutations([port("a", node=0), port("b", node=0), port("c", node=1), port("d", gbps=100)]))
def test_the_choice_does_not_hang_on_the_order(found: list[Nic]) -> None:
    assert set(nearest(found, Place(numa_node=0)).devices) == {"a:1", "b:1"}

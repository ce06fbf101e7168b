"""What sysfs says of network devices, on hosts of all sorts, and where it lies or says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from sysfs_tools import NDR, FakeSys, dgx

from raynixl.topology import Nic, NicKind, gpu_pci_path, gpu_place, nics


def by_name(root: Path) -> dict[str, Nic]:
    return {nic.device: nic for nic in nics(root)}


def test_a_host_with_many_devices(tmp_path: Path) -> None:
    dgx(tmp_path)
    found = nics(tmp_path)
    assert [nic.device for nic in found] == [*(f"mlx5_{i}:1" for i in range(9)), "ens8"]
    assert found[5] == Nic(
        device="mlx5_5:1",
        kind=NicKind.RDMA,
        is_active=True,
        link_layer="InfiniBand",
        numa_node=1,
        pci_path="pci0000:60/0000:60:01.0/0000:61:00.0/0000:62:00.0/0000:63:00.0",
        speed_gbps=400.0,
    )
    assert (found[8].link_layer, found[8].speed_gbps) == ("Ethernet", 100.0)
    assert (found[9].kind, found[9].speed_gbps, found[9].numa_node) == (NicKind.ETHERNET, 100.0, 0)


def test_devices_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    for i in (10, 9, 0):
        fake.rdma(f"mlx5_{i}", fake.pci(f"pci0000:00/0000:{i:02x}:00.0"), rate=NDR)
    assert list(by_name(tmp_path)) == ["mlx5_0:1", "mlx5_9:1", "mlx5_10:1"]


def test_a_laptop(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    fake.net("lo", state="unknown")
    fake.net("docker0", state="down")
    fake.net("veth1a2b", speed="10000")
    fake.net("enp0s31f6", fake.pci("pci0000:00/0000:00:1f.6"), state="down", speed="-1")
    fake.net("wlp3s0", fake.pci("pci0000:00/0000:00:1c.0/0000:03:00.0"))
    (tmp_path / "class/net/bonding_masters").write_text("\n")
    found = by_name(tmp_path)
    assert list(found) == ["enp0s31f6", "wlp3s0"]
    assert [nic.is_active for nic in found.values()] == [False, True]
    assert found["enp0s31f6"].speed_gbps == 0


def test_a_virtio_device_hangs_below_its_pci_device(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    virtio = fake.pci("pci0000:00/0000:00:03.0", node=1) / "virtio2"
    virtio.mkdir()
    fake.net("eth0", virtio, speed="-1")
    assert by_name(tmp_path)["eth0"] == Nic("eth0", NicKind.ETHERNET, True, "Ethernet", 1, "pci0000:00/0000:00:03.0")


def test_a_bond_stands_for_its_members_and_a_vlan_beside_its_carrier(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    fake.net("eth0", fake.pci("pci0000:00/0000:00:01.0", node=0), speed="25000")
    fake.net("eth1", fake.pci("pci0000:80/0000:80:01.0", node=1), speed="25000")
    fake.net("eth2", fake.pci("pci0000:80/0000:80:02.0", node=1), speed="10000")
    fake.net("bond0", speed="50000")
    fake.net("eth2.7", speed="10000")
    fake.net("br-docker")
    fake.net("veth0")
    fake.stack("bond0", "eth0", enslave=True)
    fake.stack("bond0", "eth1", enslave=True)
    fake.stack("eth2.7", "eth2", enslave=False)
    fake.stack("br-docker", "veth0", enslave=True)
    found = by_name(tmp_path)
    assert list(found) == ["bond0", "eth2", "eth2.7"]
    assert (found["bond0"].speed_gbps, found["bond0"].numa_node, found["bond0"].pci_path) == (50.0, -1, "")
    assert (found["eth2.7"].numa_node, found["eth2.7"].pci_path) == (1, "pci0000:80/0000:80:02.0")


def test_a_container_has_virtual_interfaces_and_lists_them_since_they_are_all(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    fake.net("lo", state="unknown", speed="")
    fake.net("eth0", speed="10000")
    assert list(by_name(tmp_path)) == ["eth0"]


def test_a_host_of_loopback_alone(tmp_path: Path) -> None:
    FakeSys(tmp_path).net("lo", state="unknown", speed="")
    assert nics(tmp_path) == [Nic("lo", NicKind.ETHERNET, is_active=True)]


def test_nothing_in_sysfs_is_no_devices(tmp_path: Path) -> None:
    assert nics(tmp_path) == []
    assert nics(tmp_path / "absent") == []


def test_this_machine_is_read() -> None:
    for nic in nics():
        assert nic.device
        assert nic.speed_gbps >= 0
        assert nic.numa_node >= -1


@pytest.mark.parametrize("garbage", ["", "abc", "-7", "9" * 400, "\x00\x01", "400 Gb/s", "4: MAYBE", "1e9", "٣"])
def test_garbage_is_not_known(tmp_path: Path, garbage: str) -> None:
    fake = FakeSys(tmp_path)
    fake.rdma("mlx5_0", fake.pci("elsewhere/xyz", node=garbage), state=garbage, layer=garbage, rate=garbage)
    fake.net("eth0", fake.pci("elsewhere/abc", node=garbage), state=garbage, speed=garbage)
    for nic in nics(tmp_path):
        assert (nic.is_active, nic.numa_node, nic.pci_path, nic.speed_gbps) == (False, -1, "", 0.0)


def test_bytes_that_are_no_text_are_not_known(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    device = fake.pci("pci0000:00/0000:00:01.0")
    fake.rdma("mlx5_0", device, rate=NDR)
    (device / "numa_node").write_bytes(b"\xff\xfe\x80" * 5000)
    assert nics(tmp_path)[0].numa_node == -1


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    fake = FakeSys(tmp_path)
    device = fake.pci("pci0000:00/0000:00:01.0", node=0)
    fake.rdma("mlx5_0", device, rate=NDR)
    port = device / "infiniband/mlx5_0/ports/1"
    for attribute in (port / "rate", port / "link_layer", device / "numa_node"):
        attribute.unlink()
        attribute.mkdir()  # fails to be read for everybody, root included
    fake.link(tmp_path / "class/infiniband/mlx5_1", tmp_path / "gone")
    (port / "state").unlink()
    (port / "state").symlink_to("state")
    assert nics(tmp_path) == [Nic("mlx5_0:1", NicKind.RDMA, False, "", -1, "pci0000:00/0000:00:01.0", 0.0)]


@pytest.mark.parametrize("bus_id", ["0000:3B:00.0", "00000000:3B:00.0", "0000:3b:00.0", " 0000:3b:00.0\n"])
def test_a_gpu_is_found_by_the_bus_ids_of_cuda_and_nvml(tmp_path: Path, bus_id: str) -> None:
    FakeSys(tmp_path).pci("pci0000:3a/0000:3a:00.0/0000:3b:00.0", node=1)
    assert gpu_pci_path(bus_id, tmp_path) == "pci0000:3a/0000:3a:00.0/0000:3b:00.0"
    place = gpu_place(bus_id, name="GPU 3", root=tmp_path)
    assert (place.name, place.numa_node, place.pci_path) == ("GPU 3", 1, "pci0000:3a/0000:3a:00.0/0000:3b:00.0")


@pytest.mark.parametrize("bus_id", ["", "../../../etc", "0000:3c:00.0", "3b:00.0", "0000:3b:00.9"])
def test_a_gpu_that_is_not_there_has_no_place(tmp_path: Path, bus_id: str) -> None:
    FakeSys(tmp_path).pci("pci0000:3a/0000:3a:00.0/0000:3b:00.0", node=1)
    assert gpu_pci_path(bus_id, tmp_path) == ""
    assert gpu_place(bus_id, name="GPU 3", root=tmp_path).numa_node == -1

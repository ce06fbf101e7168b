"""Settings that name what UCX does not have are refused by name; whatever UCX can work with is let pass."""

from __future__ import annotations

import socket

import pytest

from raynixl import BackendUnavailable
from raynixl.backends.ucx_devices import check_names, check_ports, network_devices, setting, tcp_devices

pytestmark = pytest.mark.pure

SEEN = ["self/memory", "tcp/eth0", "tcp/lo", "sysv/memory", "posix/memory", "cma/memory", "cuda_copy/cuda"]
RDMA = [*SEEN, "rc_mlx5/mlx5_0:1", "ud_mlx5/mlx5_0:1", "rc_mlx5/mlx5_1:1"]
ALONE = ["self/memory", "cma/memory"]


def test_devices_are_those_of_transports_that_leave_the_host() -> None:
    assert network_devices(RDMA) == ["eth0", "lo", "mlx5_0:1", "mlx5_1:1"]
    assert tcp_devices(RDMA) == ["eth0", "lo"]
    assert network_devices(ALONE) == []


def test_options_win_over_variables_and_each_is_named_as_the_user_wrote_it() -> None:
    assert setting("NET_DEVICES", {"NET_DEVICES": "a"}, {"UCX_NET_DEVICES": "b"}) == ("a", "UCX_NET_DEVICES=a")
    assert setting("NET_DEVICES", {}, {"UCX_NET_DEVICES": "b"}) == ("b", "UCX_NET_DEVICES=b")
    assert setting("NET_DEVICES", {}, {}) == ("", "")


@pytest.mark.parametrize(
    "names", ["", "all", "eth0", "nope,eth0", "mlx5_0:1", "mlx5_1", "^eth0", "eth*", " lo , nope ", "nope,all"]
)
def test_names_of_which_ucx_has_one_pass(names: str) -> None:
    check_names((names, f"UCX_NET_DEVICES={names}"), RDMA, lambda: RDMA)


@pytest.mark.parametrize("names", ["nope", "mlx5_2:1", "nope,ens1", "eth", "mlx5_0:2"])
def test_names_of_which_ucx_has_none_are_refused_with_those_it_has(names: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"UCX_NET_DEVICES={names} names no .* it has eth0, lo") as caught:
        check_names((names, f"UCX_NET_DEVICES={names}"), ALONE, lambda: SEEN)
    assert caught.value.hint


def test_transports_that_need_no_device_are_not_blamed_on_the_devices() -> None:
    check_names(("eth0", "UCX_NET_DEVICES=eth0"), ALONE, lambda: ALONE)


def held(count: int) -> list[socket.socket]:
    """Sockets that hold so many ports of loopback, one after the other."""
    for start in range(20000, 32000, 100):
        sockets: list[socket.socket] = []
        try:
            for port in range(start, start + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            for one in sockets:
                one.close()
        else:
            return sockets
    raise AssertionError("no free ports")


def test_a_range_passes_as_long_as_one_port_is_free() -> None:
    sockets = held(4)
    first = sockets[0].getsockname()[1]
    said = f"{first}-{first + 3}"
    try:
        with pytest.raises(BackendUnavailable, match=f"RANGE={said} has no free port on lo"):
            check_ports((said, f"RANGE={said}"), ["lo"])
        sockets[2].close()
        check_ports((said, f"RANGE={said}"), ["lo"])
    finally:
        for one in sockets:
            one.close()


@pytest.mark.parametrize("said", ["", "0", "0-0", "nonsense", "5-3", "1-99999", "1-2-3"])
def test_what_names_no_range_is_left_to_ucx(said: str) -> None:
    check_ports((said, f"RANGE={said}"), ["lo", "an interface that is not there"])

"""Whose setting of UCX counts, which one is blamed, and which transports reach a peer's memory without its help."""

from __future__ import annotations

import pytest

from raynixl import MemoryKind
from raynixl.backends.ucx_options import FORCED, TUNED, Lanes, blame, merge, read_window

pytestmark = pytest.mark.pure

DRAM, VRAM = MemoryKind.DRAM, MemoryKind.VRAM


@pytest.mark.parametrize(
    ("given", "environment", "in_force"),
    [
        ({}, {}, TUNED["TCP_TX_SEG_SIZE"]),
        ({}, {"UCX_TCP_TX_SEG_SIZE": "9K"}, None),
        ({"TCP_TX_SEG_SIZE": "7K"}, {}, "7K"),
        ({"TCP_TX_SEG_SIZE": "7K"}, {"UCX_TCP_TX_SEG_SIZE": "9K"}, "7K"),
    ],
    ids=["ours", "left to the environment, which UCX reads itself", "given", "given wins over the environment"],
)
def test_what_was_given_wins_over_the_environment_and_that_over_ours(
    given: dict[str, str], environment: dict[str, str], in_force: str | None
) -> None:
    options = merge(given, environment, device="", is_local=False)
    assert options.get("TCP_TX_SEG_SIZE") == in_force
    assert options["CMA_TX_QUOTA"] == TUNED["CMA_TX_QUOTA"]


def test_only_what_was_given_wins_over_what_is_forced() -> None:
    assert merge({}, {"UCX_RNDV_THRESH": "8192"}, device="", is_local=False)["RNDV_THRESH"] == "inf"
    assert merge({"RNDV_THRESH": "1M"}, {}, device="", is_local=False)["RNDV_THRESH"] == "1M"


def test_every_tuned_option_gives_way_to_its_variable() -> None:
    environment = {f"UCX_{name}": "mine" for name in TUNED}
    assert merge({}, environment, device="", is_local=False) == FORCED


def test_a_rail_has_its_own_device_whatever_else_is_set() -> None:
    options = merge({"NET_DEVICES": "eth9"}, {"UCX_NET_DEVICES": "eth8"}, device="mlx5_0:1", is_local=True)
    assert options["NET_DEVICES"] == "mlx5_0:1"


@pytest.mark.parametrize(
    ("given", "environment", "device"),
    [
        ({}, {}, "lo"),
        ({"NET_DEVICES": "eth0"}, {}, "eth0"),
        ({}, {"UCX_NET_DEVICES": "eth0"}, None),
    ],
)
def test_without_a_secret_the_network_is_the_loopback_interface_unless_one_is_named(
    given: dict[str, str], environment: dict[str, str], device: str | None
) -> None:
    assert merge(given, environment, device="", is_local=True).get("NET_DEVICES") == device
    assert merge({}, {}, device="", is_local=False).get("NET_DEVICES") is None


def test_what_was_given_and_the_environment_stay_as_they_are() -> None:
    given, environment = {"TLS": "tcp"}, {"UCX_TLS": "all"}
    merge(given, environment, device="lo", is_local=True)["TLS"] = "changed"
    assert (given, environment) == ({"TLS": "tcp"}, {"UCX_TLS": "all"})


@pytest.mark.parametrize(
    ("options", "environment", "blamed"),
    [
        ({"TLS": "cma"}, {}, "UCX_TLS=cma"),
        ({}, {"UCX_TLS": "cma"}, "UCX_TLS=cma"),
        ({"TLS": "cma"}, {"UCX_TLS": "all"}, "UCX_TLS=cma"),
        ({"TLS": "cma"}, {"UCX_NET_DEVICES": "eth7"}, "UCX_TLS=cma and UCX_NET_DEVICES=eth7"),
        ({"RNDV_THRESH": "inf"}, {"UCX_LOG_LEVEL": "info"}, "UCX's own settings"),
        ({"NET_DEVICES": "lo"}, {"UCX_SOCKADDR_TLS_PRIORITY": "x", "UCX_MEMTYPE_CACHE": "n"},
         "UCX_NET_DEVICES=lo and UCX_SOCKADDR_TLS_PRIORITY=x"),
    ],
)  # fmt: skip
def test_blame_names_the_settings_in_force_that_decide_which_transports_there_are(
    options: dict[str, str], environment: dict[str, str], blamed: str
) -> None:
    assert blame(options, environment) == blamed


@pytest.mark.parametrize(
    ("transports", "host_memory", "gpu_memory"),
    [
        # As UCX 1.21 names what it has chosen. Next to each what its interfaces say that they can do.
        (["rc_mlx5/mlx5_0:1", "ud_mlx5/mlx5_0:1"], "rc_mlx5/mlx5_0:1", "rc_mlx5/mlx5_0:1"),  # put and get, zero-copy
        (["rc_verbs/bnxt_re0:1"], "rc_verbs/bnxt_re0:1", "rc_verbs/bnxt_re0:1"),
        (["dc_mlx5/mlx5_0:1"], "dc_mlx5/mlx5_0:1", "dc_mlx5/mlx5_0:1"),
        (["srd/efa_0:1"], "srd/efa_0:1", "srd/efa_0:1"),  # get and put where the device has them
        (["ud_mlx5/mlx5_0:1"], "", ""),  # messages only
        (["ud_verbs/mlx5_0:1", "tcp/eth0"], "", ""),
        (["rc_gda/mlx5_0:1", "tcp/eth0"], "", ""),  # for kernels of the GPU
        (["tcp/eth0", "tcp/lo"], "", ""),  # put_zcopy, and no get; the peer's worker receives
        (["cma/memory", "tcp/lo"], "cma", ""),  # host memory only
        (["knem/memory", "tcp/lo"], "knem", ""),
        (["xpmem/memory", "tcp/lo"], "xpmem", ""),  # registers any memory of the process, unlike sysv and posix
        (["cuda_ipc/cuda", "tcp/lo"], "", "cuda_ipc/cuda"),
        (["cuda_ipc/cuda", "cma/memory", "tcp/lo"], "cma", "cuda_ipc/cuda"),
        (["cuda_copy/cuda", "gdr_copy/cuda", "tcp/eth0"], "", ""),  # copies inside one process
        (["sysv/memory", "posix/memory", "tcp/lo"], "", ""),  # put_short into memory that UCX has allocated
        (["self/memory", "tcp/lo"], "", ""),
        ([], "", ""),
    ],
)  # fmt: skip
def test_transports_that_need_the_peers_help_are_emulation(
    transports: list[str], host_memory: str, gpu_memory: str
) -> None:
    lanes = Lanes.of(transports)
    for one, direct in ((lanes, host_memory), (lanes.reaching(VRAM), gpu_memory)):
        assert one.is_emulation == (not direct)
        if direct:
            assert str(one) == direct
            assert "without the peer's help" in one.explain()
        else:
            assert "(software emulation)" in str(one)
            assert "the peer's UCX takes part" in one.explain()
        assert all(name in one.explain() for name in transports)


@pytest.mark.parametrize(
    ("transports", "slow", "near", "far", "direct"),
    [
        (["cuda_ipc/cuda", "cma/memory", "tcp/lo"], "", VRAM, VRAM, "cuda_ipc/cuda"),
        (["cuda_ipc/cuda", "cma/memory", "tcp/lo"], "pool", VRAM, VRAM, ""),
        (["cuda_ipc/cuda", "cma/memory", "tcp/lo"], "", VRAM, DRAM, ""),
        (["cuda_ipc/cuda", "cma/memory", "tcp/lo"], "", DRAM, VRAM, ""),
        (["cuda_ipc/cuda", "cma/memory", "tcp/lo"], "", DRAM, DRAM, "cma"),
        (["rc_mlx5/mlx5_0:1", "cuda_ipc/cuda"], "", VRAM, DRAM, "rc_mlx5/mlx5_0:1"),
        (["tcp/eth0"], "", VRAM, VRAM, ""),
    ],
)
def test_a_lane_is_direct_where_one_transport_reaches_both_ends(
    transports: list[str], slow: str, near: MemoryKind, far: MemoryKind, direct: str
) -> None:
    lanes = Lanes.of(transports).reaching(far, slow, near)
    assert ", ".join(lanes.direct).removesuffix("/memory") == direct
    assert lanes.is_emulation == (not direct)


def test_lanes_are_sorted_and_each_is_told_once() -> None:
    lanes = Lanes.of(["tcp/lo", "cma/memory", "tcp/lo", "tcp/eth0"])
    assert lanes.transports == ("cma/memory", "tcp/eth0", "tcp/lo")
    assert Lanes.of(["tcp/lo"]).reaching(DRAM) == Lanes.of(["tcp/lo", "tcp/lo"])
    assert str(Lanes.of([])) == "no transport (software emulation)"


@pytest.mark.parametrize(
    ("options", "environment", "most", "window"),
    [
        ({"TCP_SNDBUF": "4M", "TCP_TX_SEG_SIZE": "512K"}, {}, 4 << 20, (512 << 10) - 64),
        ({"TCP_SNDBUF": "208K", "TCP_TX_SEG_SIZE": "512K"}, {}, 208 << 10, 104 << 10),
        ({"TCP_SNDBUF": "4M"}, {"UCX_TCP_TX_SEG_SIZE": "64kb"}, 4 << 20, (64 << 10) - 64),
        ({"TCP_SNDBUF": "4M"}, {"UCX_TCP_TX_SEG_SIZE": "auto"}, 4 << 20, (8 << 10) - 64),
        ({"TCP_SNDBUF": "1K", "TCP_TX_SEG_SIZE": "512K"}, {}, 4 << 20, 16 << 10),
    ],
)
def test_a_read_that_is_emulated_asks_for_no_more_than_one_message_and_half_a_buffer(
    options, environment, most, window
):
    assert read_window(options, environment, most) == window

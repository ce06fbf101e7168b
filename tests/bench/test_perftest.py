"""The baseline ucx_perftest: run on the lane that is asked for, read rightly, and nothing of it stays."""

import importlib.util

import pytest

from raynixl.bench import perftest
from raynixl.bench.spec import TransferSpec
from raynixl.bench.transfer import run_transfer
from raynixl.errors import ConfigError, RaynixlError

needs_libucx = pytest.mark.skipif(
    importlib.util.find_spec("libucx") is None, reason="the libucx wheel is not installed"
)
pytestmark = pytest.mark.usefixtures("nothing_left")

RESULT = """
[1795634165.843691] [vm:3294 :0] | perftest intra-node cfg#0 | remote memory write by ucp_put* from host |
[1795634165.843694] [vm:3294 :0] |                    0..inf | software emulation           | tcp/lo     |
[1795634165.843696] [vm:3294 :0] | perftest intra-node cfg#0 | remote memory write by ucp_put*(multi) from host     |
[1795634165.843697] [vm:3294 :0] |                   0..2048 | short                        | sysv/memory |
[1795634165.843698] [vm:3294 :0] |                 2049..64K | copy-in                      | sysv/memory |
[1795634165.843699] [vm:3294 :0] |                65537..inf | zero-copy                    | cma/memory |
iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr
2000,6.530,11.503,11.510,5433.37,5433.37,86934,86934
"""


def test_the_median_and_the_average_are_read():
    assert perftest.parse_result(RESULT) == (6530.0, 11510.0)
    with pytest.raises(RaynixlError, match="no result"):
        perftest.parse_result("iterations\n")


@pytest.mark.parametrize(
    ("nbytes", "lane"),
    [(8, "short sysv/memory"), (65_536, "copy-in sysv/memory"), (1 << 30, "zero-copy cma/memory")],
)
def test_the_lane_is_that_of_the_messages_own_size(nbytes, lane):
    assert perftest.parse_lane(RESULT, nbytes) == lane
    assert perftest.parse_lane("", nbytes) == ""


@needs_libucx
@pytest.mark.parametrize(("op", "blocks"), [("read", 1), ("write", 40)])
def test_it_is_measured_in_turn_with_ours_on_the_lane_of_the_options(op, blocks):
    spec = TransferSpec(
        (4096,), op=op, blocks=blocks, rounds=1, baselines=("ucx_perftest",), ucx={"TLS": "tcp", "NET_DEVICES": "lo"}
    )
    ours, theirs = run_transfer(spec)
    assert (ours["impl"], theirs["impl"]) == ("raynixl", "ucx_perftest")
    assert ours["verified"] is True
    assert theirs["verified"] is None, "it checks no bytes, and nobody can see them"
    assert theirs["lane"].endswith(" tcp/lo")
    assert theirs["p50_us"] > 0


@needs_libucx
def test_options_that_leave_no_lane_are_an_error_with_its_reason():
    spec = TransferSpec((4096,), rounds=1, baselines=("ucx_perftest",), ucx={"TLS": "carrier_pigeon"})
    with pytest.raises(RaynixlError, match="asked carrier_pigeon"):
        list(run_transfer(spec))


def test_its_buffers_are_filled_and_in_the_pages_that_are_asked_for():
    small, large = 1 << 20, 1 << 21
    for nbytes in (small, large):
        plain = perftest.memory_environment(nbytes, is_in_huge_pages=False)
        assert plain == {"UCX_ALLOC_PRIO": "heap", "GLIBC_TUNABLES": "glibc.malloc.perturb=85"}
    assert perftest.memory_environment(small, is_in_huge_pages=True) == {"UCX_ALLOC_PRIO": "thp,heap"}
    huge = perftest.memory_environment(large, is_in_huge_pages=True)
    assert huge["UCX_ALLOC_PRIO"] == "heap"
    assert {"glibc.malloc.perturb=85", "glibc.malloc.hugetlb=1"} == set(huge["GLIBC_TUNABLES"].split(":"))


def test_without_the_wheel_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="not here") as caught:
        perftest.find_libucx()
    assert "pip install" in caught.value.hint

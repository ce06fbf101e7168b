"""What doctor says about UCX: which one, what it reaches, and what to do where it is missing."""

import importlib.util

import pytest

from raynixl.cli import ucx_checks

INFO = """
# Memory domain: tcp
#      Component: tcp
#      Transport: tcp
#         Device: lo
#           Type: network
#      Transport: tcp
#         Device: eth0
#  System device: <unknown>
#      Transport: cma
#         Device: memory
"""


def _findings():
    return {one.name: one for one in ucx_checks.check_ucx()}


def test_transports_are_listed_with_their_devices():
    assert ucx_checks.parse_transports(INFO) == {"tcp": ["lo", "eth0"], "cma": ["memory"]}
    assert ucx_checks.parse_transports("") == {}


@pytest.mark.usefixtures("nothing_left")
def test_the_installed_ucx_is_told_with_its_version_path_and_transports():
    pytest.importorskip("libucx", reason="the libucx wheel is not installed")
    if importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    seen = _findings()
    assert seen["ucxx"].verdict == seen["libucx"].verdict == seen["transports"].verdict == "works"
    assert "libucp.so" in seen["libucx"].detail
    assert "tcp (" in seen["transports"].detail
    assert seen["lane"].verdict in ("works", "slow")
    assert "all transports: " in seen["lane"].detail
    assert seen["ports"].verdict == "works"
    assert "RDMA device" in seen["RDMA"].detail or "devices:" in seen["RDMA"].detail


def test_without_ucxx_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    seen = _findings()
    assert list(seen) == ["ucxx"]
    assert seen["ucxx"].verdict == "missing"
    assert "raynixl[ucx]" in seen["ucxx"].hint


def test_a_library_that_does_not_load_fails_with_its_reason(monkeypatch):
    if importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    monkeypatch.setattr(ucx_checks, "_LOOK", "raise OSError('no such symbol')")
    seen = _findings()
    assert seen["libucx"].verdict == "fails"
    assert "no such symbol" in seen["libucx"].detail
    assert "transports" not in seen


def test_rdma_cards_that_this_ucx_cannot_drive_are_told_with_the_remedy(tmp_path, monkeypatch):
    cards = tmp_path / "infiniband"
    (cards / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(ucx_checks, "_INFINIBAND", cards)
    library = tmp_path / "lib" / "libucp.so"
    (library.parent / "ucx").mkdir(parents=True)
    poor = ucx_checks._check_rdma(library)
    assert (poor.verdict, "mlx5_0" in poor.detail) == ("slow", True)
    assert "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY" in poor.hint
    (library.parent / "ucx" / "libuct_ib.so.0").touch()
    assert ucx_checks._check_rdma(library).verdict == "works"


def test_a_kernel_that_takes_no_packet_filters_is_told_since_ports_are_then_open(monkeypatch):
    monkeypatch.setattr(ucx_checks, "why_no_filter", lambda: "Operation not permitted")
    seen = _findings()
    if "ports" not in seen:
        pytest.skip("ucxx is not installed")
    assert seen["ports"].verdict == "fails"
    assert "Operation not permitted" in seen["ports"].detail
    assert "docs/networking.md" in seen["ports"].hint


@pytest.fixture
def lane(monkeypatch, nothing_left):
    """What is found out about the lane under some settings of the user's."""
    pytest.importorskip("ucxx", reason="ucxx is not installed")

    def look(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return ucx_checks._check_lane()

    return look


def test_a_lane_that_reaches_memory_by_itself_works_and_is_named(lane):
    found = lane(UCX_TLS="cma,tcp")
    assert (found.area, found.name, found.verdict, found.hint) == ("ucx", "lane", "works", "")
    assert found.detail == "to this host by cma: without the peer's help; all transports: cma/memory, tcp/lo"


@pytest.mark.parametrize("settings", [{"UCX_TLS": "tcp"}, {"RAYNIXL_UCX": "TLS=tcp", "UCX_TLS": "cma,tcp"}])
def test_emulation_is_told_with_what_would_do_without_it(lane, settings):
    found = lane(**settings)
    assert found.verdict == "slow"
    assert "tcp/lo (software emulation)" in found.detail
    assert "cma" in found.hint


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"UCX_TLS": "cma"}, "UCX_TLS=cma"),
        ({"UCX_TLS": "rc_mlx5"}, "UCX_TLS=rc_mlx5"),
        ({"UCX_NET_DEVICES": "eth77"}, "UCX_NET_DEVICES=eth77"),
        ({"RAYNIXL_UCX": "TLS=cma", "UCX_TLS": "all"}, "UCX_TLS=cma"),
        ({"RAYNIXL_RAILS": "eth77", "RAYNIXL_SECRET": "of this job"}, "rails='eth77'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_leaves_no_lane_fails_and_is_named(lane, settings, blamed):
    found = lane(**settings)
    assert (found.name, found.verdict) == ("lane", "fails")
    assert blamed in found.detail
    assert found.hint

"""Configuration: what may be set, and what the environment says."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from raynixl import Agent, AgentConfig, ConfigError
from raynixl.config import check_timeout, check_wait, from_env

GOOD: list[tuple[str, str, Any]] = [
    ("BACKENDS", "shm", ("shm",)),
    ("BACKENDS", "shm,loopback", ("shm", "loopback")),
    ("NATIVE", "0", False),
    ("NATIVE", "1", True),
    ("NATIVE", "false", False),
    ("COPY_THREADS", "3", 3),
    ("INLINE_NBYTES", "0", 0),
    ("TRANSFER_TIMEOUT", "2.5", 2.5),
    ("CONNECT_TIMEOUT", "1", 1.0),
    ("REQUEST_TIMEOUT", "1e2", 100.0),
    ("DEREGISTER_TIMEOUT", "0.1", 0.1),
    ("HEARTBEAT_INTERVAL", "3", 3.0),
    ("HEARTBEAT_TIMEOUT", "7", 7.0),
    ("LEASE_SECONDS", "60", 60.0),
    ("MAX_MESSAGE_NBYTES", "4096", 4096),
    ("UCX", "TLS=cma,tcp; UCX_NET_DEVICES=eth0;", {"TLS": "cma,tcp", "NET_DEVICES": "eth0"}),
    ("UCX", "", {}),
]
BAD = [
    ("COPY_THREADS", "0"), ("COPY_THREADS", "many"), ("COPY_THREADS", "2.5"), ("COPY_THREADS", ""),
    ("INLINE_NBYTES", "-1"), ("INLINE_NBYTES", str(1 << 30)), ("NATIVE", "perhaps"), ("TRANSFER_TIMEOUT", "0"),
    ("TRANSFER_TIMEOUT", "-1"), ("TRANSFER_TIMEOUT", "nan"), ("TRANSFER_TIMEOUT", "inf"), ("LEASE_SECONDS", "1e6"),
    ("HEARTBEAT_INTERVAL", "soon"), ("MAX_MESSAGE_NBYTES", "100"),
    ("UCX", "TLS"), ("UCX", "=cma"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_variables_override_the_base(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: Any) -> None:
    monkeypatch.setenv(f"RAYNIXL_{name}", text)
    base = AgentConfig(transfer_timeout=9.0, secret=b"kept")
    found = from_env(base)
    assert getattr(found, name.lower()) == value
    assert found.secret.get_secret_value() == b"kept"
    assert found.transfer_timeout == (value if name == "TRANSFER_TIMEOUT" else 9.0)
    assert getattr(from_env(), name.lower()) == value


@pytest.mark.parametrize(("name", "text"), BAD)
def test_unusable_variables_are_named(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"RAYNIXL_{name}", text)
    with pytest.raises(ConfigError, match=name.lower()) as found:
        from_env()
    assert f"RAYNIXL_{name}" in found.value.hint


def test_the_secret_comes_from_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYNIXL_SECRET", "hush")
    found = from_env()
    assert found.secret.get_secret_value() == b"hush"
    assert "hush" not in repr(found)


def test_without_variables_the_base_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AgentConfig.model_fields:
        monkeypatch.delenv(f"RAYNIXL_{name.upper()}", raising=False)
    base = AgentConfig(copy_threads=7, backends=("shm",))
    assert from_env(base) == base
    assert from_env() == AgentConfig()


def test_a_setting_that_is_not_there_is_refused_with_the_one_that_is_like_it() -> None:
    with pytest.raises(ConfigError, match="no setting 'copy_thread'; did you mean 'copy_threads'"):
        AgentConfig(copy_thread=1)
    with pytest.raises(ConfigError, match="no setting 'nonsense'; there are: backends, native"):
        AgentConfig(nonsense=1)


@pytest.mark.parametrize("settings", [{"copy_threads": 0}, {"backends": "shm"}, {"transfer_timeout": -1.0}])
def test_an_unusable_value_is_a_config_error_that_names_its_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"setting '{next(iter(settings))}' is not usable"):
        AgentConfig(**settings)


def test_a_variable_that_sets_nothing_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAYNIXL_COPY_THREAD", "2")
    from_env()
    assert "RAYNIXL_COPY_THREAD sets nothing" in caplog.text
    assert "did you mean 'copy_threads'" in caplog.text


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        AgentConfig().copy_threads = 1  # type: ignore[misc]


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e9, "5", [5], 5j, object()])
def test_what_is_no_deadline_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigError):
        check_timeout(seconds, 1.0)
    if seconds != 0:
        with pytest.raises(ConfigError):
            check_wait(seconds)


def test_deadlines_have_defaults_and_waits_may_be_a_look() -> None:
    assert check_timeout(None, 7.0) == 7.0
    assert check_timeout(3, 7.0) == 3.0
    assert check_wait(0) == 0.0


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"give config=rx.AgentConfig"):
        Agent("a", config={"copy_threads": 2})  # type: ignore[arg-type]

"""What DeepEP's V2 calls experimental: refused here, each with what to use instead."""

from __future__ import annotations

from typing import Any, NoReturn

from raynixl.errors import ConfigError


class Experimental:
    """Engram, pipeline and all-gather calls of `ElasticBuffer`."""

    def engram_write(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("engram_write", "register the table: agent.register(storage, name=...)")

    def engram_fetch(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("engram_fetch", "read pages of a peer's table: agent.read(peer[name].pages(ids, nbytes), out)")

    def pp_set_config(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("pp_set_config", "write to the next stage: agent.write(src, peer[name], notify=...)")

    def pp_send(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("pp_send", "write to the next stage: agent.write(src, peer[name], notify=...)")

    def pp_recv(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("pp_recv", "wait for the write's notification: agent.notifications()")

    def agrs_set_config(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("agrs_set_config", _GATHER)

    def agrs_new_session(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("agrs_new_session", _GATHER)

    def create_agrs_session(self) -> NoReturn:
        """Refuse."""
        _refuse("create_agrs_session", _GATHER)

    def destroy_agrs_session(self) -> NoReturn:
        """Refuse."""
        _refuse("destroy_agrs_session", _GATHER)

    def agrs_get_inplace_tensor(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("agrs_get_inplace_tensor", _GATHER)

    def all_gather(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("all_gather", _GATHER)

    @staticmethod
    def get_engram_storage_size_hint(*args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("get_engram_storage_size_hint", "a registered table needs no buffer")

    @staticmethod
    def get_pp_buffer_size_hint(*args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("get_pp_buffer_size_hint", "a registered tensor needs no buffer")

    @staticmethod
    def get_agrs_num_max_session_bytes(*args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("get_agrs_num_max_session_bytes", _GATHER)

    @staticmethod
    def get_agrs_buffer_size_hint(*args: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _refuse("get_agrs_buffer_size_hint", _GATHER)


_GATHER = "gather with raynixl.Group.allgather(source, out)"


def _refuse(name: str, hint: str) -> NoReturn:
    raise ConfigError(f"ElasticBuffer.{name} is not offered here", hint=hint)

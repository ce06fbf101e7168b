"""Accusations: who says that whose chunks were corrupt, and who is believed."""

from __future__ import annotations

_BELIEVED = 2  # holders that one receiver may accuse; who accuses more has a fault of its own, most likely


class Accusations:
    """One accusation is enough to stop a holder from serving, unless its accuser finds everybody corrupt."""

    def __init__(self) -> None:
        self._by_accuser: dict[str, set[str]] = {}
        self.liars: frozenset[str] = frozenset()
        self.cleared: frozenset[str] = frozenset()  # accused, but by nobody who is believed

    def add(self, accuser: str, holder: str) -> None:
        """Note that a chunk that `accuser` pulled from `holder` was corrupt."""
        self._by_accuser.setdefault(accuser, set()).add(holder)
        accused = frozenset[str]().union(*self._by_accuser.values())
        believed = [holders for holders in self._by_accuser.values() if len(holders) <= _BELIEVED]
        self.liars = frozenset[str]().union(*believed)
        self.cleared = accused - self.liars

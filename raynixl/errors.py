"""The errors of raynixl: one root, and one class for each different thing that a caller does next."""

from __future__ import annotations

from typing import ClassVar, Self


class RaynixlError(Exception):
    """Root of every error raised by raynixl.

    `hint` says what to do next and is part of the message; the class's own `remedy` where the raiser knows no
    better. `peer` names the other agent where there is one.
    """

    remedy: ClassVar[str] = "see the log of the process that raised it"

    def __init__(self, message: str, *, hint: str = "", peer: str = "") -> None:
        self.message = message
        self.hint = hint if hint else self.remedy
        self.peer = peer
        super().__init__(message, self.hint, peer)

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}"

    def afresh(self) -> Self:
        """Return its like, to be raised: one that is remembered would hold on to the frames of all who raised it."""
        return type(self)(self.message, hint=self.hint, peer=self.peer)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.peer))


def _rebuild(kind: type[RaynixlError], message: str, hint: str, peer: str) -> RaynixlError:
    return kind(message, hint=hint, peer=peer)


class PeerUnknown(RaynixlError):
    """No agent of that name is published. Next: start it, wait for it, or mend the name."""

    remedy = "start that agent, wait for it, or mend the name"


class PeerLost(RaynixlError):
    """The peer died, froze or cannot be reached. Next: go on without it, or retry once it is back."""

    remedy = "go on without it, or try again once it is back"


class PeerRestarted(RaynixlError):
    """The peer lives again as another incarnation. Next: look its regions up again by name."""

    remedy = "look its regions up again: agent.peer(name)[region]"


class RegionUnknown(RaynixlError):
    """The named region is not registered, here or at the peer. Next: register it, or mend the name."""

    remedy = "register the region, or mend the name"


class RegionStale(RaynixlError):
    """The region was deregistered or registered anew. Next: look it up again."""

    remedy = "look it up again: agent.peer(name)[region]"


class RegionReadOnly(RaynixlError):
    """The destination's memory cannot be written. Next: register writable memory."""

    remedy = "register writable memory"


class RangeError(RaynixlError):
    """Blocks lie outside their region, overlap, are empty, or differ in length. Next: mend the blocks."""

    remedy = "give offsets and lengths that lie inside the region"


class TransferTimeout(RaynixlError, TimeoutError):
    """A deadline passed. Next: retry, with a longer deadline or after looking at the peer."""

    remedy = "see whether the peer is alive, then try again with a longer deadline"


class TransferCancelled(RaynixlError):
    """The transfer was cancelled by its owner."""

    remedy = "post it again; the destination's bytes are undefined"


class IntegrityError(RaynixlError):
    """Bytes are not what they should be: a wrong digest, or a malformed or foreign record."""

    remedy = "ask for it anew; what came is not from raynixl, or was damaged"


class BackendUnavailable(RaynixlError):
    """No backend can carry this. Next: install or enable what the message names."""

    remedy = "see `raynixl doctor`"


class ConfigError(RaynixlError):
    """A setting, name or argument is not usable. Next: mend it as the message says."""

    remedy = "mend the argument or the setting"


class AgentClosed(RaynixlError):
    """The agent was closed. Next: make a new one."""

    remedy = "make a new agent"


class Masked(RaynixlError):
    """This rank was masked by the other ranks of an expert-parallel group. Next: `rejoin()` brings it back."""

    remedy = "call rejoin() on the group, which brings this rank back"

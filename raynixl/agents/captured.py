"""Operations inside CUDA graphs: they run at every replay, and the host has no part in it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from raynixl import cuda
from raynixl.backends.base import CapturedProgram, GraphProgram
from raynixl.errors import ConfigError

if TYPE_CHECKING:
    from raynixl.agents.prepared import Prepared, Route


_OPEN: set[Captured] = set()
"""Those that are not closed: what a graph reads must stay, also where nobody holds on to what `capture` returned."""


class Captured:
    """A prepared operation in a graph. Its memory is in use until `close`: then no replay may be in flight or come.

    A replay cannot fail, and knows nothing of deadlines: a peer that has ended meanwhile is not noticed, and what was
    its memory stays mapped.
    """

    def __init__(self, prepared: Prepared, route: Route | None, stream: Any) -> None:
        handle = cuda.stream_handle(stream)
        if route is None:
            raise ConfigError(
                f"{prepared.summary} has no path yet", hint="post it once before the capture", peer=prepared.peer
            )
        programs = [program for program in route.programs if isinstance(program, GraphProgram)]
        if len(programs) < len(route.programs):
            raise ConfigError(
                f"{prepared.summary} cannot be captured: the host takes part in it",
                hint="memory of GPUs and arenas of one host can be", peer=prepared.peer,
            )  # fmt: skip
        self._prepared = prepared
        self._parts: list[CapturedProgram] = []
        try:
            for program in programs:
                self._parts.append(program.capture(handle))
                if code := self._parts[-1].code:
                    raise prepared.translate(code, route.link)
        except BaseException:
            self.close()
            raise
        _OPEN.add(self)

    def __repr__(self) -> str:
        return f"Captured({self._prepared.summary}, {f'{self.runs} runs' if self._parts else 'closed'})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def runs(self) -> int:
        """How many replays have come to the end of this operation: its bytes have landed that often."""
        return min((part.runs for part in self._parts), default=0)

    def close(self) -> None:
        """Let go of the memory; idempotent."""
        _OPEN.discard(self)
        parts, self._parts = self._parts, []
        for part in parts:
            part.close()

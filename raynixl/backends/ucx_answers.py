"""Answers: tells peers how UCX reaches our regions, starting UCX and pinning memory when the first one asks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from raynixl.backends.base import Local
from raynixl.backends.ucx_exports import Exports
from raynixl.backends.ucx_key import seal_workers
from raynixl.backends.ucx_lane import UcxLink
from raynixl.backends.ucx_wireup import MAX_WORDS, Answer, Ask, Refusal, pack
from raynixl.errors import BackendUnavailable, PeerLost, RaynixlError, TransferTimeout

logger = logging.getLogger(__name__)

MAX_AT_A_TIME = 64


class Answers:
    """Answers on the reactor's thread what needs no work, and the rest on short-lived threads, so many at most."""

    def __init__(
        self, local: Local, exports: Exports, *, workers: Callable[[], Sequence[bytes]], window: Callable[[], int]
    ) -> None:
        self._local = local
        self._exports = exports
        self._workers = workers
        self._window = window
        self._lock = threading.Lock()  # protects _running
        self._running = 0

    def give(self, link: UcxLink, ask: Ask) -> None:
        """Answer a peer, now or later."""
        if self._exports.is_mapped(ask.region):
            self._answer(link, ask)
            return
        with self._lock:
            is_crowded = self._running >= MAX_AT_A_TIME
            self._running += not is_crowded
        if is_crowded:
            self._refuse(link, ask, TransferTimeout(f"{self._local.name!r} is overloaded", hint="retry later"))
            return
        try:
            threading.Thread(target=self._work, args=(link, ask), name="raynixl-key", daemon=True).start()
        except RuntimeError as exc:  # the process may have no more threads
            with self._lock:
                self._running -= 1
            self._refuse(link, ask, TransferTimeout(f"{self._local.name!r}: {exc}", hint="retry later"))

    def _work(self, link: UcxLink, ask: Ask) -> None:
        try:
            self._answer(link, ask)
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, link: UcxLink, ask: Ask) -> None:
        try:
            sealed = self._exports.sealed(ask.region, link)
            workers = seal_workers(self._local.incarnation, self._workers())
            slow = self._exports.why_slow(ask.region)[:MAX_WORDS]
            answer = Answer(
                number=ask.number, sealed=pack(sealed), workers=pack(workers), window=self._window(), slow=slow
            )
            self._reply(link, answer)
        except RaynixlError as exc:
            self._refuse(link, ask, exc)
        except Exception as exc:  # whatever it is, who asked must not wait for an answer in vain
            logger.exception("could not tell %s how UCX reaches region %d", link.peer, ask.region)
            why = f"{self._local.name!r} could not say how UCX reaches its region {ask.region}: {exc}"
            self._refuse(link, ask, BackendUnavailable(why, hint=f"see the log of {self._local.name!r}"))

    def _refuse(self, link: UcxLink, ask: Ask, error: RaynixlError) -> None:
        refusal = Refusal(
            number=ask.number, error=type(error).__name__, message=error.message[:4000], hint=error.hint[:1000]
        )
        self._reply(link, refusal)

    def _reply(self, link: UcxLink, message: Answer | Refusal) -> None:
        try:
            link.send_control(message.model_dump_json().encode())
        except PeerLost as exc:
            logger.debug("could not answer %s: %s", link.peer, exc)

"""Stopped: which peers are known to be stopped, so that nobody waits for them who need not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from raynixl.errors import RaynixlError, TransferTimeout
from raynixl.weights.conversation import Asking

if TYPE_CHECKING:
    from raynixl.agents import Agent

_BEATS = 1.5  # of the heart: within one each peer that runs says something
_SHARE = 0.1  # of the time that the others took


def stopped(agent: Agent, names: Iterable[str], seconds: float) -> dict[str, RaynixlError]:
    """Return those of these peers that are stopped and silent, if that has been so for long enough; and the errors.

    It is long enough for who has nothing else to wait for: a little more than a heart beats, or a tenth of the
    `seconds` that all others took. An agent gives a peer up for everything only after `heartbeat_timeout`.
    """
    silence = max(_BEATS * agent.config.heartbeat_interval, _SHARE * seconds)
    found: dict[str, RaynixlError] = {}
    for name in names:
        connection = agent.connector.current(name)
        if connection is None or connection.lost is not None or time.monotonic() - connection.heard < silence:
            continue
        try:
            is_frozen = connection.link.is_frozen()
        except RaynixlError:
            continue  # it is lost by now, and that is told by itself
        if is_frozen:
            found[name] = TransferTimeout(
                f"{name!r} is stopped, and all others are waiting for it",
                hint="resume it with SIGCONT: it takes part in the next push", peer=name,
            )  # fmt: skip
    return found


def ask_running(
    agent: Agent, topic: str, payloads: Mapping[str, bytes], deadline: float, *,
    has_other: Callable[[str, set[str]], bool],
) -> dict[str, bytes | RaynixlError]:  # fmt: skip
    """Ask every peer of `payloads` at once; return what each answered, or why it did not.

    Those that are stopped are waited for only while others are. `has_other` tells of one whether some that have
    answered stand in for it; if not, it is waited for until the deadline.
    """
    asking, began = Asking(agent, topic, deadline), time.monotonic()
    asking.ask(payloads)
    answers: dict[str, bytes | RaynixlError] = {}
    while asking.open:
        answers |= asking.collect()
        late = stopped(agent, asking.open, time.monotonic() - began)
        well = {name for name, answer in answers.items() if isinstance(answer, bytes)}
        if late.keys() == set(asking.open) and all(has_other(name, well) for name in late):
            asking.give_up(late)
            answers |= late
    return answers

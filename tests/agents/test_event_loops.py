"""One agent serves any number of event loops, also loops that come and go."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
from agent_tools import MIB, PATIENCE, random_bytes

from raynixl import Agent


def test_several_loops_use_one_agent_at_once(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("same", lambda _peer, payload: payload, threaded=False)
    nbytes, loops = 9 * MIB, 4
    regions = [bob.empty(nbytes) for _ in range(loops)]
    sources = [alice.register(random_bytes(nbytes, number)) for number in range(loops)]
    failures: list[BaseException] = []

    async def use(number: int) -> None:
        for turn in range(3):
            plan = alice.prepare("write", sources[number], regions[number].describe())
            transfers = [plan.post() for _ in range(2)]
            await asyncio.gather(*(wait(transfer) for transfer in transfers))
            assert await alice.ask("bob", "same", bytes([turn])) == bytes([turn])
        assert np.array_equal(regions[number].array(), sources[number].array())

    async def wait(transfer: object) -> None:
        await transfer  # type: ignore[misc]

    def run(number: int) -> None:
        try:
            asyncio.run(asyncio.wait_for(use(number), PATIENCE))
        except BaseException as exc:  # noqa: BLE001 - told to the test
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 2)
    assert not failures, failures


def test_a_loop_that_ended_while_it_waited_harms_nobody(pair: tuple[Agent, Agent]) -> None:
    """Its futures are still on the lists; messages, answers and ends that come later reach those who live."""
    alice, bob = pair
    go_on = threading.Event()
    bob.serve("late", lambda _peer, _payload: b"late" if go_on.wait(PATIENCE) else b"", threaded=True)
    reply = alice.ask("bob", "late")

    async def look() -> None:
        for coroutine in (alice.next_notification(PATIENCE), _reply()):
            task = asyncio.ensure_future(coroutine)
            await asyncio.sleep(0)
            abandoned.append(task)

    async def _reply() -> bytes:
        return await reply

    abandoned: list[asyncio.Future[object]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(look())
    loop.close()
    bob.notify("alice", b"note")
    assert alice.wait_notification(PATIENCE).payload == b"note"
    go_on.set()
    assert reply.wait(PATIENCE) == b"late"
    assert alice.ask("bob", "late").wait(PATIENCE) == b"late"
    for task in abandoned:
        task._log_destroy_pending = False  # type: ignore[attr-defined]

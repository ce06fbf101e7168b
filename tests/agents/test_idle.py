"""An agent that has nothing to do does not wake up; one that is connected hardly does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from agent_tools import PATIENCE, introduce

from raynixl import Agent


def switches() -> int:
    """How often raynixl's threads of this process have slept and woken."""
    total = 0
    for thread in threading.enumerate():
        if thread.name.startswith("raynixl") and thread.native_id is not None:
            with open(f"/proc/self/task/{thread.native_id}/status", encoding="ascii") as status:
                total += sum(int(line.split()[1]) for line in status if line.startswith("voluntary"))
    return total


def test_idle_agents_sleep(new_agent: Callable[..., Agent]) -> None:
    agents = [new_agent(f"agent {number}", backends=("shm",)) for number in range(4)]
    introduce(*agents)
    region = agents[0].empty(4096, name="far")
    for agent in agents[1:]:
        mine = agent.register(np.ones(4096, np.uint8))
        agent.write(mine, agent.peer("agent 0")["far"], notify=b"x", timeout=PATIENCE).wait()
        agents[0].wait_notification(PATIENCE)
    assert region.array().all()
    time.sleep(0.2)  # what the transfers above have set off comes to rest
    before, began = switches(), time.monotonic()
    time.sleep(1.0)
    per_second = (switches() - before) / (time.monotonic() - began)
    assert per_second < 100, f"{per_second:.0f} wake-ups a second"  # 3 heartbeats each way: about 15

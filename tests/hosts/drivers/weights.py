"""A driver: a trainer on the head syncs its weights to rollouts on every node, some of which are lost on the way."""

from __future__ import annotations

import os
import signal
from hashlib import sha256
from typing import Any

import ray
from nodes import get, join, on

import raynixl as rx
from raynixl.config import from_env

os.environ["RAYNIXL_HEARTBEAT_TIMEOUT"] = "2"  # of this driver's agent
CONFIG = from_env()  # and of the workers'
WIDTH = 512
LOSSES = (rx.PeerLost, rx.PeerUnknown, rx.TransferTimeout)  # a host that is gone answers nothing, not even that


class Worker:
    """A model with weights of its own."""

    def __init__(self, seed: int) -> None:
        import torch  # which takes seconds, and the driver needs none

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.flips: list[int] = []
        self.model = torch.nn.Sequential(torch.nn.Linear(64, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.ReLU())

    def digest(self) -> str:
        """What tells the weights from others."""
        total = sha256()
        for tensor in self.model.state_dict().values():
            total.update(tensor.contiguous().numpy())
        return total.hexdigest()


@ray.remote
@rx.worker(config=CONFIG)
class Trainer(Worker):
    """Publishes."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rx.publish("model", self.model, chunk_nbytes=1 << 16)

    def step(self) -> str:
        """Change every weight; return the new digest."""
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        return self.digest()


@ray.remote
@rx.worker(config=CONFIG)
class Rollout(Worker):
    """Subscribes."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rx.subscribe("model", self.model, on_flip=self.flips.append)

    def flipped(self) -> list[int]:
        """The versions that were flipped to."""
        return self.flips

    def die(self) -> None:
        """End as if by a crash."""
        os.kill(os.getpid(), signal.SIGKILL)


def digests(workers: list[Any]) -> list[str]:
    """The digests of the workers' weights."""
    return get([worker.digest.remote() for worker in workers])


def start(nodes: list[str]) -> tuple[Any, list[Any]]:
    """A trainer on the head and three rollouts, on the nodes in turn; all have weights of their own."""
    trainer: Any = Trainer.options(**on(nodes[0], name="trainer")).remote(0)
    rollouts: list[Any] = [
        Rollout.options(**on(nodes[rank % len(nodes)], name=f"rollout-{rank}")).remote(1 + rank) for rank in range(3)
    ]
    assert len({*digests([trainer, *rollouts])}) == 4
    return trainer, rollouts


def check_push(sync: rx.WeightSync, version: int, trainer: Any, rollouts: list[Any], *, lost: set[str]) -> None:
    """Push a version to all rollouts that are not lost."""
    expected = get(trainer.step.remote())
    report = sync.push(version, timeout=15.0)
    assert {*report.excluded} == lost, report
    assert all(isinstance(error, LOSSES) for error in report.excluded.values()), report
    assert digests(rollouts) == [expected] * len(rollouts)


def main() -> None:
    """Push versions: to all; without a rollout that has died; without those of the last host, once it is gone."""
    trainer, rollouts = start(join())
    sync = rx.WeightSync("model", sources=[trainer], targets=rollouts, timeout=30.0)
    check_push(sync, 1, trainer, rollouts, lost=set())
    check_push(sync, 2, trainer, rollouts, lost=set())
    rollouts.pop(2).die.remote()  # it was on the head
    check_push(sync, 3, trainer, rollouts, lost={"rollout-2"})
    print("pull the plug", flush=True)
    assert input() == "it is pulled"
    rollouts.pop(1)
    check_push(sync, 4, trainer, rollouts, lost={"rollout-1", "rollout-2"})
    assert get(rollouts[0].flipped.remote()) == [1, 2, 3, 4]


main()

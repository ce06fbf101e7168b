"""All ranks together: what the driver has them do, and how one of them is replaced."""

import time
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from torch import Tensor
from worker import ExpertWorker

KILL_AFTER = 0.02  # seconds from the begin of a step to the death of a worker in it


class Ranks:
    """The workers, one for each rank."""

    def __init__(self, count: int) -> None:
        self.generation = 0
        self.workers = [self._start(rank) for rank in range(count)]
        self._join(step=0)

    def step(self, step: int, victim: int | None = None) -> tuple[list[float], list[dict[int, int]]]:
        """Have all do a step; return the loss of each, and for each layer how many tokens each expert saw.

        A victim is killed meanwhile.

        Raises:
            RayActorError: a worker has died.
        """
        results = [worker.step.remote(step) for worker in self.workers]
        if victim is not None:
            time.sleep(KILL_AFTER)
            ray.kill(self.workers[victim])
        losses, loads = zip(*_get_all(results), strict=True)
        merged = [{name: seen for part in layer for name, seen in part.items()} for layer in zip(*loads, strict=True)]
        return [loss for (loss,) in losses], merged

    def replace(self, rank: int, step: int) -> None:
        """Start a worker in a rank's place; all go on with the step that was under way."""
        self.generation += 1
        self.workers[rank] = self._start(rank)
        self._join(step)

    def differences(self, expected: dict[str, Tensor], step: int) -> list[str]:
        """Name the parameters which before a step are not, bit for bit, those of a single process, moments included."""
        states = _get_all([worker.state.remote(step) for worker in self.workers])
        ours = {
            name.replace("copies.0.", f"copies.{rank}."): values
            for rank, state in enumerate(states)
            for name, values in state.items()
        }
        names = ours.keys() | expected.keys()
        return sorted(name for name in names if not _is_equal(ours.get(name), expected.get(name)))

    def leave(self) -> None:
        """Have all ranks part."""
        _get_all([worker.leave.remote() for worker in self.workers])

    def _start(self, rank: int) -> ActorHandle:
        return ExpertWorker.options(name=f"rank-{rank}-{self.generation}").remote()

    def _join(self, step: int) -> None:
        names = _get_all([worker.name.remote() for worker in self.workers])
        _get_all([worker.join.remote(names, self.generation, step) for worker in self.workers])


def _get_all(results: list[ray.ObjectRef]) -> list[Any]:
    """Wait for all results; return them, or raise an error: the death of a worker rather than what it led to."""
    values, errors = [], []
    for result in results:
        try:
            values.append(ray.get(result))
        except RayError as error:
            errors.append(error)
    if errors:
        raise next((error for error in errors if isinstance(error, RayActorError)), errors[0])
    return values


def _is_equal(ours: Tensor | None, theirs: Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours.view(torch.int32), theirs.view(torch.int32))

"""Training by Adam, with all that a step changes in one tensor: so it can be kept, taken back and handed on."""

from collections.abc import Callable, Sequence

import torch
from model import Model
from torch import Tensor

LEARNING_RATE, BETAS, EPSILON = 3e-3, (0.9, 0.99), 1e-8


class Training:
    """Trains a model whose parameters lie in `memory` [2, 3, size]: parameters and Adam's two moments, twice.

    The state that step s begins with lies in memory[s % 2]; what the step makes of it goes to the other half. So the
    step can be done again as long as the next one has not ended.
    """

    def __init__(self, model: Model, memory: Tensor) -> None:
        self.model, self.memory = model, memory
        self.shared = size_of(model.copies[0])
        memory.zero_()
        memory[:, 0] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def step(self, step: int, batches: Sequence[Tensor], add_up: Callable[[Tensor], Tensor]) -> list[float]:
        """Do one step; return the losses. `add_up` sums the gradients [copies, shared] of all ranks, in their order."""
        state, following = self.memory[step % 2], self.memory[(step + 1) % 2]
        self._use(state[0])
        losses = self.model(batches)
        torch.stack(losses).sum().backward()
        with torch.no_grad():
            gradients = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])
            shared = gradients[: len(batches) * self.shared].view(len(batches), self.shared)
            shared.copy_(add_up(shared).expand_as(shared))
            adam(state, following, gradients, step + 1)
        return [loss.item() for loss in losses]

    def loads(self) -> list[dict[int, int]]:
        """Return for each layer how many tokens each expert that is here saw in the last step."""
        return [layer.last_loads() for layer in self.model.layers]

    def state(self, step: int) -> dict[str, Tensor]:
        """Return each parameter with its moments before a step, by its name in the model."""
        parameters = dict(self.model.named_parameters())
        parts = self.memory[step % 2].split([parameter.numel() for parameter in parameters.values()], dim=1)
        return {name: part.clone() for name, part in zip(parameters, parts, strict=True)}

    def _use(self, values: Tensor) -> None:
        """Have the model's parameters lie in `values`, without gradients."""
        parameters = list(self.model.parameters())
        parts = values.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data, parameter.grad = part.view_as(parameter), None


def adam(state: Tensor, following: Tensor, gradients: Tensor, count: int) -> None:
    """Write what Adam makes of parameters and moments into `following`."""
    (values, mean, square), (first, second) = state, BETAS
    torch.add(first * mean, (1 - first) * gradients, out=following[1])
    torch.add(second * square, (1 - second) * gradients * gradients, out=following[2])
    change = following[1] / (1 - first**count) / ((following[2] / (1 - second**count)).sqrt() + EPSILON)
    torch.sub(values, LEARNING_RATE * change, out=following[0])


def size_of(module: torch.nn.Module) -> int:
    """Return how many numbers a module's parameters are."""
    return sum(parameter.numel() for parameter in module.parameters())

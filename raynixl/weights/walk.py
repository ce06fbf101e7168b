"""The walk over a model: its tensors by name, gone through anew only where something in it was replaced."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any

from raynixl.weights.tensors import named_tensors

if TYPE_CHECKING:
    import torch

    from raynixl.weights.tensors import Model, Tensors


class Walk:
    """A model's named tensors. To find that nothing was replaced takes some 0.1 us for each tensor and module."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._last: Tensors = {}
        self._dicts: list[tuple[Mapping[str, Any], list[str], list[Any]]] | None = None
        self._sets: list[tuple[set[str], frozenset[str]]] = []
        self._modules: list[tuple[torch.nn.Module, Any, Any, Any]] = []

    def tensors(self) -> Tensors:
        """Return the model's tensors, and the very same dict as before for as long as they are the same objects.

        Raises:
            ConfigError: it is neither a module nor a state dict.
        """
        if self._dicts is None or not self._is_same():
            self._last = named_tensors(self._model)
            self._remember()
        return self._last

    def _remember(self) -> None:
        """Note every dict that says which tensors there are, and under which names, and which buffers are left out."""
        import torch

        dicts: list[Mapping[str, Any]] = []
        self._sets, self._modules = [], []
        if isinstance(self._model, torch.nn.Module):
            for module in self._model.modules():
                own = module._parameters, module._buffers, module._modules
                dicts += own
                self._modules.append((module, *own))
                hidden = module._non_persistent_buffers_set
                if module._buffers:
                    self._sets.append((hidden, frozenset(hidden)))
        else:
            dicts.append(self._model)
        self._dicts = [(one, list(one), list(one.values())) for one in dicts]

    def _is_same(self) -> bool:
        assert self._dicts is not None
        if not all(m._parameters is p and m._buffers is b and m._modules is s for m, p, b, s in self._modules):
            return False
        return all(_holds(*one) for one in self._dicts) and all(now == then for now, then in self._sets)


def _holds(found: Mapping[str, Any], names: list[str], values: list[Any]) -> bool:
    """Whether a dict has these names and objects, in this order."""
    return len(found) == len(names) and all(map(is_, found.values(), values)) and list(found) == names

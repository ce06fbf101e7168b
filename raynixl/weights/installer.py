"""The installer: how a version gets from a slot into the tensors of a target, by repointing them or by copying."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from raynixl.errors import ConfigError
from raynixl.weights.difference import difference, table
from raynixl.weights.layout import Entry, Layout, build_layout
from raynixl.weights.tensors import collect, copy_tensors, describe, is_writable_in_place, note_change

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.weights.arenas import Arenas
    from raynixl.weights.tensors import Model, Tensors


Form: TypeAlias = "tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]"


class Install(enum.Enum):
    """How a version is installed."""

    AUTO = "auto"
    SWAP = "swap"
    COPY = "copy"


def choose(install: str, model: Model) -> Install:
    """Return SWAP or COPY for a target.

    Raises:
        ConfigError: it is no way to install, or not one for this target.
    """
    if install not in {way.value for way in Install}:
        raise ConfigError(f"install={install!r:.40} is not known", hint="use 'auto', 'swap' or 'copy'")
    tensors = collect(model)
    is_host = all(tensor.device.type == "cpu" for tensor in tensors.values())
    if install == Install.SWAP.value and not is_host:
        raise ConfigError("tensors on a device cannot be repointed to host memory", hint="use install='copy'")
    if install == Install.AUTO.value:
        return Install.SWAP if is_host and not isinstance(model, Mapping) else Install.COPY
    return Install(install)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a flip to one slot does: tensors to repoint and tensors to copy into, each with its new value."""

    repoint: list[tuple[torch.Tensor, torch.Tensor]]
    copy: list[tuple[torch.Tensor, torch.Tensor]]

    def run(self, agent: Agent) -> list[torch.Tensor]:
        """Install the version; the caller has the weights alone.

        Returns the old values, to be dropped once readers may go on: giving 1 GB back to the system takes 60 ms.
        """
        copy_tensors(agent, self.copy)
        old = [tensor.data for tensor, _ in self.repoint]
        for tensor, value in self.repoint:
            tensor.data = value
        note_change([tensor for tensor, _ in (*self.repoint, *self.copy)])
        return old


class Installer:
    """Knows a target's tensors. They are looked at anew for each version, so a module may replace its own."""

    def __init__(self, model: Model, install: str, *, owner: str) -> None:
        self._owner = owner
        self.way = choose(install, model)
        self._model = model
        self._tensors: Tensors = {}
        self._forms: dict[str, Form] = {}
        self._layout = Layout((), ())
        self._plans: WeakKeyDictionary[Arenas, Steps] = WeakKeyDictionary()
        self._look()

    @property
    def layout(self) -> Layout:
        """The target's own layout."""
        return self._layout

    def has_changed(self) -> bool:
        """Whether tensors of the model were replaced, cast or cut anew since it was last looked at."""
        tensors, known = collect(self._model), self._tensors
        if tensors.keys() != known.keys() or any(tensor is not known[name] for name, tensor in tensors.items()):
            return True
        return {name: _form(tensor) for name, tensor in tensors.items()} != self._forms

    def lies_in(self, slot: Arenas) -> bool:
        """Whether a tensor of the model lies in a slot, which then must not be written."""
        return any(slot.holds(tensor) for tensor in collect(self._model).values())

    def check(self, source: Layout) -> None:
        """Refuse a source whose tensors do not fit.

        Raises:
            ConfigError: with a table of all differences.
        """
        self._look()
        rows = difference(source, self._layout)
        if rows:
            raise ConfigError(
                f"{len(rows)} tensors differ between the source and {self._owner!r}:\n{table(rows)}\n",
                hint="publish and subscribe the same model",
            )

    def plan(self, slot: Arenas) -> Steps:
        """Return the steps that install what lies in a slot, whose layout was checked; made once for a slot."""
        if slot not in self._plans:
            self._plans[slot] = self._make_plan(slot)
        return self._plans[slot]

    def _make_plan(self, slot: Arenas) -> Steps:
        repoint, copy = [], []
        views: dict[tuple[object, ...], torch.Tensor] = {}
        owners: dict[tuple[int, int], tuple[int, int]] = {}
        done: set[int] = set()
        for name, tensor in self._tensors.items():
            source, mine = slot.layout.by_name[name], self._layout.by_name[name]
            if id(tensor) in done or source.nbytes == 0:
                continue
            done.add(id(tensor))
            key = (source.place, source.dtype, source.shape)
            value = views.setdefault(key, slot.tensor(source)) if key not in views else views[key]
            alone = owners.setdefault(source.place, mine.place) == mine.place
            if alone and self._is_repointed(tensor, mine):
                repoint.append((tensor, value))
            else:
                copy.append((tensor, value))
        return Steps(repoint, copy)

    def _is_repointed(self, tensor: torch.Tensor, mine: Entry) -> bool:
        """Strided tensors keep their strides, and views of each other their tie, by being copied into."""
        if self.way is not Install.SWAP or mine.sharing:
            return False
        return tensor.is_contiguous() or not is_writable_in_place(tensor)

    def _look(self) -> None:
        """Look at the model again."""
        tensors = collect(self._model)
        self._tensors, self._layout = tensors, build_layout(describe(tensors))
        self._forms = {name: _form(tensor) for name, tensor in tensors.items()}
        self._plans.clear()
        for name, tensor in tensors.items():
            if not is_writable_in_place(tensor) and (self.way is Install.COPY or self._layout.by_name[name].sharing):
                raise ConfigError(
                    f"elements of {name!r} share memory: it cannot be copied into", hint="subscribe a contiguous copy"
                )


def _form(tensor: torch.Tensor) -> Form:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())

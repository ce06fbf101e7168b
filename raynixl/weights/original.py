"""The original: a source's own tensors, what is published of them, and how they get into a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError
from raynixl.weights.conversion import FP8, SCALE_SUFFIX, Conversion
from raynixl.weights.converted import converted
from raynixl.weights.copyout import CopyOut, Digests
from raynixl.weights.dtensor import local_tensors, shards_of
from raynixl.weights.layout import Layout
from raynixl.weights.quantising import quantise
from raynixl.weights.selection import Select, choose
from raynixl.weights.shards import Shards
from raynixl.weights.space import gpus_of, space_of, spaces_for
from raynixl.weights.streams import on_ours
from raynixl.weights.tensors import CopyJob, copy_tensors, dtype_name, is_tied, memory_of
from raynixl.weights.walk import Walk

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.weights.copies import Copy
    from raynixl.weights.tensors import Model, Tensors

    Form = tuple[str, tuple[int, ...]]

_MAX_NAMES = 5
_HINT = "close the publication and publish the changed model"


@dataclass(frozen=True, slots=True)
class Publish:
    """What is published of a model: all of it as it is, unless something else is said."""

    shards: Shards | None = None
    select: Select | None = None
    conversion: Conversion = field(default_factory=Conversion)
    in_place: bool = False
    memory: str = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """The tensors that were found at one look, what of the model they are of, and where each of them lay."""

    tensors: Tensors
    chosen: Tensors
    memory: list[tuple[object, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What brings the tensors of a look into one copy, prepared once."""

    look: Look
    copy_out: CopyOut
    quantised: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Original:
    """A model whose tensors are looked at anew for each version, so that a trainer may replace them.

    Raises:
        ConfigError: it holds what cannot be carried, or not what the shards name.
    """

    def __init__(self, model: Model, what: Publish, *, name: str) -> None:
        self._name = name
        self._select = what.select
        self._in_place = what.in_place
        self._walk = Walk(model)
        self._chosen: tuple[Tensors, Tensors] | None = None  # what the last walk found, and what of it is selected
        chosen = self._choose()
        tensors = local_tensors(chosen)
        own = shards_of(chosen) if what.shards is None else what.shards
        self._forms: dict[str, Form] = {entry.name: (entry.dtype, entry.shape) for entry in own.layout.entries}
        self._is_plain = all(tensor is chosen[name] for name, tensor in tensors.items())
        self._last: Look | None = None
        self._check(tensors, "what its shards name", "mend the shards, or what is selected")
        self.shards = converted(own, what.conversion)
        self.layout: Layout = self.shards.layout
        self.spaces = spaces_for(tensors.values(), what.memory)
        if what.in_place:
            self.spaces = self.spaces[:1]
            self._check_movable(chosen)

    def tensors(self) -> Iterable[torch.Tensor]:
        """Return the tensors that were found at the last look."""
        return (self._last or self.look()).tensors.values()

    def look(self) -> Look:
        """Return the published tensors as they are now: the same value as before while all lie where they lay.

        Raises:
            ConfigError: they are of other kinds than when they were published.
        """
        chosen = self._choose()
        memory = [memory_of(tensor) for tensor in chosen.values()] if self._is_plain else []
        last = self._last
        if last is None or not memory or chosen is not last.chosen or memory != last.memory:
            last = self._last = Look(self._checked(chosen), chosen, memory)
        return last

    def _choose(self) -> Tensors:
        """Return what is selected of the model, the same value as before if no tensor was replaced."""
        found = self._walk.tensors()
        if self._chosen is None or self._chosen[0] is not found:
            self._chosen = found, choose(found, self._select)
        return self._chosen[1]

    def _checked(self, chosen: Tensors) -> Tensors:
        tensors = local_tensors(chosen)
        self._check(tensors, "what was published", _HINT)
        tensors = {name: tensors[name] for name in self._forms}
        heads: dict[tuple[int, int], str] = {}
        for name, tensor in tensors.items():
            first = heads.setdefault(self.layout.by_name[name].place, name)
            if tensor.numel() and not is_tied(tensors[first], tensor):
                raise ConfigError(
                    f"{name!r} and {first!r} were tied when {self._name!r} was published, and are no more", hint=_HINT
                )
        return tensors

    def copy_out(self, agent: Agent, look: Look, copy: Copy, digests: Digests) -> None:
        """Bring tensors, converted, to where they lie in a copy, tied ones once, and digest of them what costs no pass.

        What is published in place lies there already, save tensors that the trainer has replaced.
        """
        if self._in_place:
            self._move(agent, look.tensors, copy.view)
            return
        if copy.work is None or copy.work.look is not look:
            copy.work = self._work(look, copy)
        copy.work.copy_out.run(agent, copy.arenas.bank, digests)
        quantised = copy.work.quantised
        with on_ours(gpus_of(tensor for tensor, _, _ in quantised)):
            for tensor, stored, scales in quantised:
                quantise(tensor, stored, scales)

    def _work(self, look: Look, copy: Copy) -> Work:
        heads = {self.layout.by_name[name].place: name for name in reversed(look.tensors)}
        pairs, quantised = [], []
        for name in reversed(heads.values()):
            if self.layout.by_name[name].dtype == FP8 != self._forms[name][0]:
                quantised.append((look.tensors[name], copy.view(name), copy.view(name + SCALE_SUFFIX)))
            else:
                pairs.append((copy.view(name), look.tensors[name]))
        return Work(look, CopyOut(CopyJob(pairs)), quantised)

    def move(self, agent: Agent, view: Callable[[str], torch.Tensor]) -> None:
        """Move the tensors into a copy for good: their values lie there from now on."""
        self._move(agent, self.look().tensors, view)

    def _move(self, agent: Agent, tensors: Tensors, view: Callable[[str], torch.Tensor]) -> None:
        away = [(view(name), tensor) for name, tensor in tensors.items() if not is_tied(view(name), tensor)]
        away = [(value, tensor) for value, tensor in away if tensor.numel()]
        copy_tensors(agent, away)
        for value, tensor in away:
            tensor.data = value

    def _check_movable(self, tensors: Tensors) -> None:
        import torch

        for name in self._forms:
            tensor = tensors[name]
            is_plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
            is_there = is_plain and space_of(tensor) == self.spaces[0] and tensor.is_contiguous()
            if not is_there or self.layout.by_name[name].sharing:
                raise ConfigError(
                    f"{name!r:.200} is not plain and contiguous on {self.spaces[0].name}, or overlaps another tensor",
                    hint="publish it with copy_out=True",
                )

    def _check(self, tensors: Tensors, what: str, hint: str) -> None:
        """Refuse tensors that are not those of the shards."""
        changed = [name for name in self._forms if name not in tensors or _form(tensors[name]) != self._forms[name]]
        if changed:
            raise ConfigError(
                f"{len(changed)} tensors of {self._name!r} are not {what}: {', '.join(changed[:_MAX_NAMES])}", hint=hint
            )


def _form(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return dtype_name(tensor), tuple(tensor.shape)

"""The installer: how a version gets from a slot into the tensors of a target, by repointing them or by copying."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.difference import difference, table
from raynixl.weights.digest import version_digest
from raynixl.weights.dtensor import local_tensors, shards_of
from raynixl.weights.layout import Entry, Layout, build_layout
from raynixl.weights.recorder import FULL, Loader, Recording, record
from raynixl.weights.selection import Select
from raynixl.weights.selection import choose as choose_names
from raynixl.weights.space import Space, space_of, spaces_for
from raynixl.weights.tensor_digest import Placed, can_digest, digest_tensors
from raynixl.weights.tensors import CopyJob, describe, is_writable_in_place, memory_of, named_tensors, note_change
from raynixl.weights.walk import Walk

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.weights.arenas import Arenas
    from raynixl.weights.pieces import TensorInfo
    from raynixl.weights.shards import Shards
    from raynixl.weights.tensors import Model, Tensors


logger = logging.getLogger(__name__)

Form: TypeAlias = "tuple[torch.dtype, tuple[int, ...], tuple[int, ...], Space]"


@dataclass(frozen=True, slots=True)
class Target:
    """What of a model follows: all of it as whole tensors, unless something else is said."""

    shards: Shards | None = None
    select: Select | None = None
    record: Loader | None = None
    memory: str = "auto"


class Install(enum.Enum):
    """How a version is installed."""

    AUTO = "auto"
    SWAP = "swap"
    COPY = "copy"


def choose(install: str, model: Model, tensors: Tensors, *, space: Space) -> Install:
    """Return SWAP or COPY for a target and its local tensors, when versions are to lie in `space`.

    Raises:
        ConfigError: it is no way to install, or not one for this target.
    """
    if install not in {way.value for way in Install}:
        raise ConfigError(f"install={install!r:.40} is not known", hint="use 'auto', 'swap' or 'copy'")
    is_there = all(space_of(tensor) == space for tensor in tensors.values())
    if install == Install.SWAP.value and not is_there:
        raise ConfigError(
            f"not all tensors are on {space.name}, where versions lie: they cannot be repointed to them",
            hint="use install='copy'",
        )
    if install == Install.AUTO.value:  # on a GPU, captured graphs know the tensors by their addresses
        is_plain = not isinstance(model, Mapping) and all(one is tensors.get(name, one) for name, one in _own(model))
        return Install.SWAP if is_there and space.is_host and is_plain else Install.COPY
    return Install(install)


class Copying:
    """Tensors to copy into, each with its new value; sorted out anew only if they lie elsewhere than the last time."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.pairs = pairs
        self._memory: list[tuple[object, ...]] = []
        self._job: CopyJob | None = None

    def run(self, agent: Agent) -> None:
        """Copy."""
        memory = [memory_of(target) for target, _ in self.pairs]
        if self._job is None or memory != self._memory:
            self._job, self._memory = CopyJob(self.pairs), memory
        self._job.run(agent)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a flip to one slot does: tensors to repoint and tensors to copy into, each with its new value."""

    repoint: list[tuple[torch.Tensor, torch.Tensor]]
    copy: Copying
    load: Callable[[], object] | None = None
    """What the engine's own loader does with tensors that it gets whole."""

    def run(self, agent: Agent) -> list[torch.Tensor]:
        """Install the version; the caller has the weights alone.

        Returns the old values, to be dropped once readers may go on: giving 1 GB back to the system takes 60 ms.
        """
        self.copy.run(agent)
        old = [tensor.data for tensor, _ in self.repoint]
        for tensor, value in self.repoint:
            tensor.data = value
        if self.load is not None:
            self.load()
        note_change([tensor for tensor, _ in (*self.repoint, *self.copy.pairs)])
        return old


class Installer:
    """Knows a target's tensors. They are looked at anew for each version, so a module may replace its own.

    `spaces` are where versions are to lie, the best first.
    """

    def __init__(self, model: Model, what: Target, install: str, *, owner: str) -> None:
        self._owner = owner
        self._model = model
        self._what = what
        self._walk = Walk(model)
        self._collected: tuple[Tensors, Tensors] | None = None  # what the last walk found, and its local tensors
        tensors = self._collect()
        self.spaces = spaces_for(tensors.values(), what.memory)
        self.way = choose(install, model, tensors, space=self.spaces[0])
        self._recording: Recording | None = None
        self._tensors: Tensors = {}
        self._forms: list[Form] = []
        self._layout = Layout((), ())
        self._plans: WeakKeyDictionary[Arenas, Steps] = WeakKeyDictionary()
        self._placed: WeakKeyDictionary[Arenas, Placed] = WeakKeyDictionary()
        self._look()

    def tensors(self) -> Iterable[torch.Tensor]:
        """Return the tensors that were found when the model was last looked at."""
        return self._tensors.values()

    @property
    def layout(self) -> Layout:
        """The target's own layout."""
        return self._layout

    @property
    def is_recorded(self) -> bool:
        """Whether what it needs is found out by running its loader over the source's tensors."""
        return self._what.record is not None

    def has_changed(self) -> bool:
        """Whether tensors of the model were replaced, moved, cast or cut anew since it was last looked at."""
        tensors, known = self._collect(), self._tensors
        is_same = tensors is known or (
            tensors.keys() == known.keys() and all(tensor is known[name] for name, tensor in tensors.items())
        )
        return not is_same or [_form(tensor) for tensor in known.values()] != self._forms

    def lies_in(self, slot: Arenas) -> bool:
        """Whether a tensor of the model lies in a slot, which then must not be written."""
        return slot.holds_any(self._collect().values())

    def needs(self, infos: Sequence[TensorInfo]) -> Shards:
        """Return what the target needs of a source that has these tensors.

        Raises:
            ConfigError: the recorded loader fails, or the declared shards do not speak of the target's tensors.
        """
        self._look()
        if self._what.record is not None:
            self._recording = record(self._what.record, infos, self._model)
            return self._recording.shards
        shards = self._what.shards
        if shards is None:
            return shards_of(choose_names(named_tensors(self._model), self._what.select))
        self.check(shards.layout)
        return shards

    def check(self, image: Layout) -> None:
        """Refuse an image whose tensors are not the target's.

        Raises:
            ConfigError: with a table of all differences.
        """
        self._look()
        known = self._layout.by_name
        named = [entry for entry in image.entries if not entry.name.startswith(FULL)]
        mine = Layout(tuple(known[entry.name] for entry in named if entry.name in known), ())
        rows = difference(Layout(tuple(named), ()), mine)
        if rows:
            raise ConfigError(
                f"{len(rows)} tensors differ between the source and {self._owner!r}:\n{table(rows)}\n",
                hint="publish and subscribe the same model",
            )

    def install(self, slot: Arenas, before: Arenas | None, agent: Agent) -> list[torch.Tensor]:
        """Install what lies in a slot; the caller has the weights alone. Returns the old values (see `Steps.run`).

        Raises:
            IntegrityError: that failed midway. What lies in `before` is back, if it could be; the error says if not.
        """
        try:
            return self.plan(slot).run(agent)
        except Exception as exc:  # the engine's own loader may have run; whoever pushes gets it
            is_back = before is not None and self._is_back(before, agent)
            raise IntegrityError(
                f"a version could not be installed at {self._owner!r}: {exc!r}"
                + ("" if is_back else "; its weights are undefined until the next version"),
                hint="see the engine's log, and push again",
            ) from exc

    def _is_back(self, before: Arenas, agent: Agent) -> bool:
        try:
            self.plan(before).run(agent)
        except Exception:
            logger.exception("the version before could not be put back at %r", self._owner)
            return False
        return True

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
            source, mine = slot.layout.by_name.get(name), self._layout.by_name[name]
            if source is None or id(tensor) in done or source.nbytes == 0:
                continue
            done.add(id(tensor))
            key = (source.place, source.dtype, source.shape)
            value = views.setdefault(key, slot.tensor(source)) if key not in views else views[key]
            alone = owners.setdefault(source.place, mine.place) == mine.place
            if alone and space_of(tensor) == slot.space and self._is_repointed(tensor, mine):
                repoint.append((tensor, value))
            else:
                copy.append((tensor, value))
        return Steps(repoint, Copying(copy), self._load(slot))

    def _load(self, slot: Arenas) -> Callable[[], object] | None:
        """Return what runs the loader over the tensors that it must get whole, if there are any."""
        recording, loader = self._recording, self._what.record
        if recording is None or loader is None or not recording.full:
            return None
        local = {entry.name: slot.tensor(entry) for entry in slot.layout.entries}
        return lambda: loader(recording.to_load(local))

    def is_installed(self, slot: Arenas, version: int, digest: str, agent: Agent) -> bool:
        """Whether what a version was copied into holds its very bytes, as far as tensors can be seen here."""
        if slot not in self._placed:
            self._placed[slot] = Placed(list(self._heads(slot)))
        mine = self._placed[slot].digest(seed=version, native=agent.native)
        if version_digest(mine) == digest:
            return True
        # some cannot be seen, or share memory with others
        seen = [(slot.tensor(entry), entry) for tensor, entry in self._heads(slot) if can_digest(tensor)]
        theirs = digest_tensors(seen, seed=version, native=agent.native)
        return bool(np.array_equal(mine, theirs))

    def _heads(self, slot: Arenas) -> Iterator[tuple[torch.Tensor, Entry]]:
        """Yield one tensor for each place in a slot."""
        places = set()
        for entry in slot.layout.entries:
            tensor = self._tensors.get(entry.name)
            if tensor is not None and entry.nbytes and entry.place not in places:
                places.add(entry.place)
                yield tensor, entry

    def _is_repointed(self, tensor: torch.Tensor, mine: Entry) -> bool:
        """Strided tensors keep their strides, and views of each other their tie, by being copied into."""
        if self.way is not Install.SWAP or mine.sharing:
            return False
        return tensor.is_contiguous() or not is_writable_in_place(tensor)

    def _collect(self) -> Tensors:
        """Return the local tensors, the same value as before if none was replaced."""
        found = self._walk.tensors()
        if self._collected is None or self._collected[0] is not found:
            chosen = choose_names(found, self._what.select)
            tensors = local_tensors(chosen)
            if any(tensor is not chosen[name] for name, tensor in tensors.items()):
                return tensors  # of DTensors, whose local ones may be others each time
            self._collected = found, tensors
        return self._collected[1]

    def _look(self) -> None:
        """Look at the model again."""
        tensors = self._collect()
        self._tensors, self._layout = tensors, build_layout(describe(tensors))
        self._forms = [_form(tensor) for tensor in tensors.values()]
        self._plans.clear()
        self._placed.clear()
        for name, tensor in tensors.items():
            if not is_writable_in_place(tensor) and (self.way is Install.COPY or self._layout.by_name[name].sharing):
                raise ConfigError(
                    f"elements of {name!r} share memory: it cannot be copied into", hint="subscribe a contiguous copy"
                )


def _own(model: Model) -> Iterable[tuple[str, torch.Tensor]]:
    return named_tensors(model).items()


def _form(tensor: torch.Tensor) -> Form:
    return tensor.dtype, tensor.shape, tensor.stride(), space_of(tensor)

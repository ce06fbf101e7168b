"""Selection: which tensors of a model are carried, by their names: LoRA adapters alone, for one."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from raynixl.errors import ConfigError

Select: TypeAlias = str | Sequence[str] | Callable[[str], bool]
"""A glob such as "*.lora_*", several of which one must match, or a function that says of each name whether it is."""

_HINT = "give a glob such as '*.lora_*', a list of them, or a function of the name"
T = TypeVar("T")


def selector(select: Select | None) -> Callable[[str], bool]:
    """Return what says of a name whether it is selected; None selects all.

    Raises:
        ConfigError: it is neither globs nor a function.
    """
    if select is None:
        return lambda _name: True
    if callable(select):
        return select
    globs = [select] if isinstance(select, str) else list(select)
    if not globs or any(not isinstance(glob, str) for glob in globs):
        raise ConfigError(f"select={select!r:.80} selects nothing that is known", hint=_HINT)
    return lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def choose(tensors: Mapping[str, T], select: Select | None) -> dict[str, T]:
    """Return what is selected, by name, in order; without a selection all.

    Raises:
        ConfigError: it is nothing.
    """
    if select is None:
        return dict(tensors)
    is_selected = selector(select)
    chosen = {name: tensor for name, tensor in tensors.items() if is_selected(name)}
    if not chosen:
        some = ", ".join(repr(name[:60]) for name in list(tensors)[:3])
        raise ConfigError(f"select={select!r:.80} matches none of {len(tensors)} tensors, such as {some}", hint=_HINT)
    return chosen

"""The names of raynixl.moe lead to what they say, and no module of the package hides one of them."""

from __future__ import annotations

import pkgutil

import pytest

from raynixl import moe


@pytest.mark.parametrize("name", moe.__all__)
def test_a_name_leads_to_what_is_called_so(name: str) -> None:
    for _ in range(2):  # the first time it is imported
        assert getattr(moe, name).__name__ == name


def test_no_module_is_called_as_a_name() -> None:
    assert not {found.name for found in pkgutil.iter_modules(moe.__path__)} & set(moe.__all__)


def test_other_names_are_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Dispatch'"):
        _ = moe.Dispatch

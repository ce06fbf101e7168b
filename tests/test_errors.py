"""Every error says what to do, and survives being pickled."""

from __future__ import annotations

import pickle

import pytest

from raynixl import errors
from raynixl.errors import RaynixlError

pytestmark = pytest.mark.pure

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RaynixlError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_has_a_remedy_even_if_its_raiser_names_none(kind: type[RaynixlError]) -> None:
    error = kind("it broke", peer="bob")
    assert error.hint == kind.remedy
    assert str(error) == f"it broke; {kind.remedy}"
    assert "remedy" in vars(kind), "each is a different thing that the caller does next"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_travels_whole(kind: type[RaynixlError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it broke", hint="mend it", peer="bob")))
    assert type(error) is kind
    assert (error.message, error.hint, error.peer, str(error)) == ("it broke", "mend it", "bob", "it broke; mend it")


def test_a_timeout_is_one_of_pythons_too() -> None:
    assert issubclass(errors.TransferTimeout, TimeoutError)

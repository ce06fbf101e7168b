"""The proof of the secret: bound to the secret, the role, and everything that both ends said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.authentication import Identity, is_proof, prove

pytestmark = pytest.mark.pure

CLIENT = Identity("alice", "a" * 32, "01" * 16)
SERVER = Identity("bob", "b" * 32, "02" * 16)
PROOF = prove(b"secret", "client", CLIENT, SERVER)


def test_the_holder_of_the_secret_is_believed() -> None:
    assert is_proof(b"secret", PROOF, "client", CLIENT, SERVER)
    assert prove(b"secret", "client", CLIENT, SERVER) == PROOF


@pytest.mark.parametrize("field", ["name", "incarnation", "nonce"])
def test_a_proof_holds_for_these_two_ends_only(field: str) -> None:
    other = "c" * 32
    assert not is_proof(b"secret", PROOF, "client", replace(CLIENT, **{field: other}), SERVER)
    assert not is_proof(b"secret", PROOF, "client", CLIENT, replace(SERVER, **{field: other}))


def test_a_proof_holds_for_one_secret_and_one_role_only() -> None:
    assert not is_proof(b"", PROOF, "client", CLIENT, SERVER)
    assert not is_proof(b"secret2", PROOF, "client", CLIENT, SERVER)
    assert not is_proof(b"secret", PROOF, "server", CLIENT, SERVER)
    assert not is_proof(b"secret", PROOF, "client", SERVER, CLIENT)


@given(st.text(), st.text(), st.integers(0, 20))
def test_bytes_moved_from_one_field_to_the_next_make_another_proof(name: str, rest: str, at: int) -> None:
    text = name + rest
    one, other = Identity(text[:at], text[at:], "0"), Identity(name, rest, "0")
    proofs = [prove(b"s", "client", identity, SERVER) for identity in (one, other)]
    assert (proofs[0] == proofs[1]) == (one == other)


def test_identities_are_never_the_same_twice() -> None:
    assert len({Identity.fresh("a", "b").nonce for _ in range(1000)}) == 1000


def test_the_secret_is_in_no_proof() -> None:
    assert b"secret".hex() not in PROOF
    assert len(PROOF) == 64

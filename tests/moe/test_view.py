"""Views: who takes part, in which grid, and what travels of that."""

import pytest

from raynixl.errors import IntegrityError
from raynixl.moe.grid import Grid
from raynixl.moe.view import Answer, Ask, Member, View, first_view

pytestmark = pytest.mark.pure
TOKEN = "0123456789abcdef" * 2


def members(hosts, gone=()):
    return tuple(
        Member(name=f"rank{rank}", host=host, token=None if rank in gone else f"{rank:032x}")
        for rank, host in enumerate(hosts)
    )


def test_groups_are_hosts_and_those_that_are_left_close_up():
    view = first_view(members("aabb"), None)
    assert view.groups == ((0, 1), (2, 3))
    assert view.grid() == (Grid(((0, 1), (2, 3))), (0, 1, 2, 3))
    later = view.changed(leader=0, since=7, members=members("aabb", gone=[2]), is_joining=False)
    assert later.groups == view.groups
    assert later.grid() == (Grid(((0, 1), (2,))), (0, 1, 3))  # numbered as they lie among those that are left
    last = later.changed(leader=0, since=8, members=members("aabb", gone=[2, 3]), is_joining=False)
    assert last.grid() == (Grid(((0, 1),)), (0, 1))


def test_who_is_new_comes_into_the_group_of_its_host_or_into_the_smallest_of_a_given_grid():
    by_host = first_view(members("aabb"), None)
    assert by_host.changed(leader=0, since=1, members=members("aabbab"), is_joining=True).groups == (
        (0, 1, 4),
        (2, 3, 5),
    )
    given = first_view(members("xxxxx"), Grid(((0, 1, 2), (3, 4))))
    assert given.changed(leader=0, since=1, members=members("xxxxxx"), is_joining=True).groups == ((0, 1, 2), (3, 4, 5))


def test_of_two_views_with_one_number_the_lower_leaders_counts():
    view = first_view(members("aabb"), None)
    one = view.changed(leader=1, since=3, members=members("aabb", gone=[0]), is_joining=False)
    two = view.changed(leader=2, since=3, members=members("aabb", gone=[1]), is_joining=False)
    assert two.order < one.order
    assert view.order < two.order


def test_a_session_is_known_by_its_token():
    view = first_view(members("aabb", gone=[3]), None)
    assert view.has(1, f"{1:032x}")
    assert not view.has(1, TOKEN)
    assert not view.has(3, f"{3:032x}")
    assert not view.has(9, TOKEN)
    assert view.live == (0, 1, 2)


def test_what_travels_comes_back_and_what_is_malformed_is_refused():
    view = first_view(members("aabb"), None)
    ask = Ask(kind="commit", rank=1, token=TOKEN, view=view, suspects=((2, TOKEN),))
    assert Ask.from_bytes(ask.to_bytes()) == ask
    answer = Answer(
        rank=1, token=TOKEN, scene="s", host="a", is_running=True, view=view, adopted=-1, position=-1, is_busy=False,
        barred=(2,), names=("a", "b"), holders=(0, -1),
    )  # fmt: skip
    assert Answer.from_bytes(answer.to_bytes()) == answer
    for wrong in (b"", b"{}", ask.to_bytes()[:-9], ask.to_bytes().replace(b"commit", b"forget")):
        with pytest.raises(IntegrityError):
            Ask.from_bytes(wrong)
    assert isinstance(view, View)

"""Events: waited for once, with a hook, in a with statement; errors are told to whoever waits."""

from __future__ import annotations

import pytest

from raynixl import ConfigError, PeerLost
from raynixl.compat.deep_ep import EventHandle, EventOverlap
from raynixl.compat.deep_ep.events import Work, wait_for

pytestmark = pytest.mark.pure


def test_work_is_done_by_whoever_waits_first_and_once():
    done = []
    work = Work(lambda: done.append(1))
    handle = EventHandle(work)
    assert "under way" in repr(handle)
    EventOverlap(handle).current_stream_wait()
    handle.current_stream_wait()
    work.finish()
    assert done == [1]
    assert "reached" in repr(handle)


def test_an_error_is_raised_to_everyone_who_waits():
    def fail():
        raise PeerLost("rank 1 is lost")

    event = EventOverlap(EventHandle(Work(fail)))
    for _ in range(2):
        with pytest.raises(PeerLost, match="rank 1"):
            event.current_stream_wait()


def test_the_end_of_a_with_statement_waits():
    done = []
    event = EventOverlap(EventHandle(Work(lambda: done.append("waited"))))
    with event(release_handle=True):
        done.append("computed")
    assert done == ["computed", "waited"]
    assert event.event is None
    with event:
        pass


def test_the_hook_after_the_wait_is_called_once():
    called = []
    event = EventOverlap(EventHandle())
    event.register_hook_after_wait(lambda: called.append(1))
    with pytest.raises(ConfigError, match="has a hook"):
        event.register_hook_after_wait(lambda: None)
    event.current_stream_wait()
    event.current_stream_wait()
    assert called == [1]


def test_without_an_event_there_is_nothing_to_wait_for():
    with pytest.raises(ConfigError, match="done already"):
        EventOverlap().current_stream_wait()
    wait_for(None)
    wait_for(EventOverlap())


def test_previous_events_of_either_kind_are_waited_for():
    done = []
    wait_for(EventHandle(Work(lambda: done.append(1))))
    wait_for(EventOverlap(EventHandle(Work(lambda: done.append(2)))))
    assert done == [1, 2]

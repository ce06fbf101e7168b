"""A push that waits for a trainer's update takes the weights as they are, and where they lie, when that is over."""

import threading
import time

import pytest
import torch
from device_stand_in import StandIn

from raynixl.weights import WeightSync, publish, subscribe

SECONDS = 20.0


def push_in_background(sync, version, publication):
    """Begin a push, and return its thread and report once it waits for the trainer."""
    reports = []
    thread = threading.Thread(target=lambda: reports.append(sync.push(version)))
    thread.start()
    deadline = time.monotonic() + SECONDS
    while publication._copies.wait_free(0.0):  # until the freeze has taken a copy, which is just before it waits
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.join(0.3)
    assert thread.is_alive()
    return thread, reports


@pytest.mark.parametrize("where", ["host", "gpu"])
def test_tensors_that_an_update_has_moved_are_copied_from_where_they_lie_now(fleet, where, monkeypatch):
    device = StandIn()
    device.install(monkeypatch)
    source = torch.nn.Linear(256, 1024)
    target = torch.nn.Linear(256, 1024)
    if where == "gpu":
        device.move(source)
    trainer = fleet("trainer")
    publication = publish(trainer, "p", source, delta="off")
    subscribe(fleet("rollout"), "p", target)
    sync = WeightSync(trainer, "p", ["trainer"], ["rollout"], timeout=SECONDS)
    for version in (1, 2):
        with torch.no_grad():
            source.weight.fill_(version)
        sync.push(version).raise_for_excluded()
    with publication.updating():
        thread, reports = push_in_background(sync, 3, publication)
        old, new = source.weight.data, torch.full((1024, 256), 3.0)
        source.weight.data = device.to(new) if where == "gpu" else new
        old.fill_(9.0)  # somebody else has this memory now
    thread.join(SECONDS)
    reports[0].raise_for_excluded()
    assert target.weight.unique().tolist() == [3.0]

"""Publications in place: nothing is copied at a push, and the trainer waits until its weights are released."""

import threading
import time

import pytest
import torch
from weights_sources import Puller
from weights_tools import Policy, fill, same

from raynixl.errors import ConfigError, TransferTimeout
from raynixl.weights import publish
from raynixl.weights.shards import replicated
from raynixl.weights.tensors import collect, describe


def in_place(fleet, source):
    publication = publish(fleet("trainer"), "w", source, copy_out=False)
    return publication, Puller(fleet("engine"), "w", ["trainer"], [replicated(describe(collect(source)))])


def test_parameters_are_read_where_they_lie_and_a_trainer_goes_on_with_them(fleet):
    source = Policy(value=1.0)
    optimiser = torch.optim.SGD(source.parameters(), lr=0.5)
    kept = dict(source.named_parameters())
    _, puller = in_place(fleet, source)
    before = {name: tensor.data_ptr() for name, tensor in source.state_dict().items()}
    for version in (1, 2, 3):
        assert same(puller.push(version)[0], source)
        source.head.weight.grad = torch.ones_like(source.head.weight)
        optimiser.step()
        assert source.embedding.weight[0, 0] == 1 - version / 2
    assert all(dict(source.named_parameters())[name] is tensor for name, tensor in kept.items())
    assert {name: tensor.data_ptr() for name, tensor in source.state_dict().items()} == before


def test_a_trainer_waits_for_the_release_before_it_changes_weights(fleet):
    source = Policy(value=1.0)
    publication, puller = in_place(fleet, source)
    push, frozen = puller.freeze(1)
    with pytest.raises(TransferTimeout, match="not free"), publication.updating(timeout=0.1):
        pass
    changed = threading.Event()

    def train():
        with publication.updating(timeout=20), publication.updating():
            fill(source, 2.0)
        changed.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    assert not changed.wait(0.1)
    assert same(puller.pull(1, frozen)[0], Policy(value=1.0))
    puller.release(push, committed=False)
    assert changed.wait(10)
    trainer.join(10)
    assert same(puller.push(2)[0], Policy(value=2.0))


def test_a_push_waits_while_the_trainer_changes_weights_in_place(fleet):
    source = Policy(value=1.0)
    publication, puller = in_place(fleet, source)
    pulled = []
    with publication.updating():
        pusher = threading.Thread(target=lambda: pulled.append(puller.push(1)))
        pusher.start()
        pusher.join(0.1)
        fill(source, 3.0)
        with publication.updating():
            fill(source, 4.0)
    pusher.join(20)
    assert same(pulled[0][0], Policy(value=4.0))


def test_trainers_and_pushes_in_turn_never_tear_what_lies_in_place(fleet):
    source = Policy()
    publication, puller = in_place(fleet, source)
    stop = threading.Event()

    def train():
        step = 0.0
        while not stop.is_set():
            step += 1.0
            with publication.updating():
                fill(source, step)
            time.sleep(0)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for version in range(1, 15):
            (image,) = puller.push(version)
            assert len({value for tensor in image.values() for value in tensor.unique().tolist()}) == 1
    finally:
        stop.set()
        trainer.join(10)


def test_a_tensor_that_the_trainer_replaced_is_moved_in_at_the_next_push(fleet):
    source = {"a": torch.ones(100), "b": torch.ones(100)}
    _, puller = in_place(fleet, source)
    place = source["a"].data_ptr()
    source["a"] = torch.full((100,), 7.0)
    assert same(puller.push(1)[0], {"a": torch.full((100,), 7.0), "b": torch.ones(100)})
    assert source["a"].data_ptr() == place


def test_weights_outlive_a_publication_in_place(fleet):
    source = Policy(value=5.0)
    publication, puller = in_place(fleet, source)
    puller.push(1)
    publication.close()
    fleet.agents[0].close()
    assert source.eval()() == {5.0}
    fill(source, 6.0)
    assert source() == {6.0}


def test_what_cannot_lie_elsewhere_or_is_converted_is_refused(fleet):
    agent, line = fleet("trainer"), torch.randn(10)
    for model in ({"t": torch.randn(4, 3).t()}, {"a": line[:6], "b": line[4:]}):
        with pytest.raises(ConfigError, match="copy_out=True"):
            publish(agent, "w", model, copy_out=False)
    for wrong in ({"cast": "bfloat16"}, {"quantise": "fp8"}, {"while_busy": "copy"}):
        with pytest.raises(ConfigError, match="not copied out"):
            publish(agent, "w", Policy(), copy_out=False, **wrong)
    publish(agent, "w", Policy()).close()

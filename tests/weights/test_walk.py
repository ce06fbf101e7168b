"""A walk over a model gives the same value until some tensor in it is another object, or has another name."""

import pytest
import torch

from raynixl.errors import ConfigError
from raynixl.weights.tensors import named_tensors
from raynixl.weights.walk import Walk

pytestmark = pytest.mark.pure


def model():
    part = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    part.register_buffer("hidden", torch.zeros(1), persistent=False)
    return part


def replace_parameter(found):
    found[0].weight = torch.nn.Parameter(torch.ones(3, 2))


def add_parameter(found):
    found[0].extra = torch.nn.Parameter(torch.ones(1))


def drop_parameter(found):
    found[0].bias = None


def replace_buffer(found):
    found[1].running_mean = torch.ones(3)


def show_buffer(found):
    found._non_persistent_buffers_set.clear()


def hide_buffer(found):
    found[1]._non_persistent_buffers_set.add("running_mean")


def replace_module(found):
    found[1] = torch.nn.LayerNorm(3)


def rename(found):
    found[0]._parameters = {"b": found[0].bias, "w": found[0].weight}


def reorder(found):
    found[0]._parameters = {"bias": found[0].bias, "weight": found[0].weight}


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter, add_parameter, drop_parameter, replace_buffer, show_buffer, hide_buffer, replace_module,
        rename, reorder,
    ],
)  # fmt: skip
def test_what_is_replaced_is_found(change):
    found = model()
    walk = Walk(found)
    before = walk.tensors()
    assert walk.tensors() is before
    change(found)
    after = walk.tensors()
    assert list(after) == list(named_tensors(found))
    assert all(one is other for one, other in zip(after.values(), named_tensors(found).values(), strict=True))
    assert after is not before
    assert walk.tensors() is after


def test_new_values_of_the_same_tensors_are_nothing_new():
    found = model()
    walk = Walk(found)
    before = walk.tensors()
    with torch.no_grad():
        found[0].weight.fill_(3)
        found[0].weight.data = torch.zeros(3, 2)
    assert walk.tensors() is before


def test_state_dicts_are_walked_too():
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    walk = Walk(state)
    before = walk.tensors()
    assert walk.tensors() is before
    state["a"] = torch.zeros(1)
    assert walk.tensors()["a"] is state["a"]
    del state["b"]
    assert list(walk.tensors()) == ["a"]
    state["b"] = torch.zeros(1)
    assert list(walk.tensors()) == ["a", "b"]


def test_what_holds_no_weights_is_refused():
    with pytest.raises(ConfigError, match="holds no weights"):
        Walk(3).tensors()

"""Selection: globs and functions of names."""

import pytest

from raynixl.errors import ConfigError
from raynixl.weights.selection import choose, selector

pytestmark = pytest.mark.pure

NAMES = dict.fromkeys(("base.weight", "lora_A.weight", "lora_B.weight", "Lora_C"))


@pytest.mark.parametrize(
    ("select", "chosen"),
    [
        (None, list(NAMES)),
        ("lora_*", ["lora_A.weight", "lora_B.weight"]),
        (["*_A.*", "base.*"], ["base.weight", "lora_A.weight"]),
        (lambda name: name.endswith("C"), ["Lora_C"]),
        ("lora_[AB].weight", ["lora_A.weight", "lora_B.weight"]),
    ],
)
def test_what_is_selected_stays_in_order(select, chosen):
    assert list(choose(NAMES, select)) == chosen


@pytest.mark.parametrize("select", ["nothing", [], [3], ["x", None], lambda _name: False])
def test_selecting_nothing_is_refused(select):
    with pytest.raises(ConfigError, match="select="):
        choose(NAMES, select)


def test_without_a_selection_there_may_be_nothing():
    assert choose({}, None) == {}
    assert selector(None)("anything")

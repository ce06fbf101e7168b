"""@rx.worker: a decorated class stays itself, in Ray and outside of it."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import ray
from actor_tools import AsyncHolder, Holder, Plain, get
from ray import cloudpickle

import raynixl as rx

pytestmark = pytest.mark.pure

Make = Callable[..., Any]


@rx.worker
class Documented:
    """What it says."""

    def __init__(self, first: int, second: str = "two") -> None:
        """Take two."""
        self.values = (first, second)


class Undecorated:
    """The same without."""

    def __init__(self, first: int, second: str = "two") -> None:
        """Take two."""


@rx.worker
class Bare:
    """Has no __init__."""

    def name(self) -> str:
        return rx.agent().name


def test_name_doc_module_and_signature_stay() -> None:
    assert (Documented.__name__, Documented.__qualname__) == ("Documented", "Documented")
    assert Documented.__doc__ == "What it says."
    assert Documented.__module__ == __name__
    assert inspect.signature(Documented) == inspect.signature(Undecorated)
    assert Documented.__init__.__doc__ == "Take two."
    assert str(inspect.signature(Bare)) == "()"


def test_outside_an_actor_it_is_a_plain_class() -> None:
    assert Documented(1).values == (1, "two")
    assert isinstance(Bare(), Bare)
    with pytest.raises(TypeError, match="first"):
        Documented()  # type: ignore[call-arg]


def test_class_and_instances_survive_pickling() -> None:
    again = cloudpickle.loads(cloudpickle.dumps(Documented))
    assert again(3).values == (3, "two")
    copied = cloudpickle.loads(cloudpickle.dumps(Documented(4)))
    assert copied.values == (4, "two")
    assert pickle.loads(pickle.dumps(Plain)) is Plain


@pytest.mark.parametrize("target", [lambda: None, Documented(1), "Rollout", 7])
def test_only_classes_are_decorated(target: Any) -> None:
    with pytest.raises(rx.ConfigError, match="attach"):
        rx.worker(target)


def test_inheritance_outside_ray_runs_each_init_once() -> None:
    ran = []

    @rx.worker
    class Base:
        def __init__(self) -> None:
            ran.append("base")

    class Mixin:
        def __init__(self) -> None:
            ran.append("mixin")
            super().__init__()

    @rx.worker
    class Middle(Base):
        """Has no __init__ of its own, so Python goes on to the next in line."""

    class Other(Base):
        def __init__(self) -> None:
            ran.append("other")
            super().__init__()

    @rx.worker
    class Leaf(Middle, Other, Mixin):
        def __init__(self) -> None:
            ran.append("leaf")
            super().__init__()

    Leaf()
    assert ran == ["leaf", "other", "base"]


@pytest.mark.ray
def test_under_and_above_ray_remote(make: Make) -> None:
    class Under(Plain):
        pass

    above = rx.worker(ray.remote(num_cpus=0)(Plain))
    for number, kind in enumerate((ray.remote(num_cpus=0)(rx.worker(Under)), above)):
        handle = make(kind, 4096, fill=number + 1, options={"name": f"place-{number}"})
        name, _, pid = get(handle.who.remote())
        assert name == f"place-{number}"
        seen = rx.agent().empty(4096)
        rx.agent().read(rx.agent().peer(name)["memory"], seen).wait(timeout=10.0)
        assert seen.array().tolist() == [number + 1] * 4096
        assert pid in {one.pid for one in _listed() if one.name == name}


def _listed() -> list[Any]:
    from raynixl.actors import list_agents

    return list_agents()


@pytest.mark.ray
def test_without_init_and_without_name_the_agent_is_named_after_class_and_actor(make: Make) -> None:
    from raynixl.actors import agent_name

    handle = make(ray.remote(num_cpus=0)(Bare))
    name = get(handle.name.remote())
    assert name == f"Bare-{handle._actor_id.hex()[:12]}"
    assert agent_name(handle) == name


@pytest.mark.ray
def test_an_instance_made_beside_the_actor_starts_no_agent(make: Make) -> None:
    @ray.remote(num_cpus=0)
    class Bystander:
        def names(self, kind: type) -> tuple[str, str]:
            kind(1)
            return rx.agent().name, ray.get_runtime_context().get_actor_id()

    @rx.worker(name="unwanted")
    class Part:
        def __init__(self, value: int) -> None:
            self.value = value

    name, actor_id = get(make(Bystander).names.remote(Part))
    assert name == f"Bystander-{actor_id[:12]}"


@pytest.mark.ray
def test_decorator_takes_a_name_and_a_configuration(make: Make) -> None:
    config = rx.AgentConfig(copy_threads=1, lease_seconds=12.0)

    @ray.remote(num_cpus=0)
    @rx.worker(name="chosen", config=config)
    class Set:
        def seen(self) -> tuple[str, float]:
            return rx.agent().name, rx.agent().config.lease_seconds

    assert get(make(Set, options={"name": "given"}).seen.remote()) == ("chosen", 12.0)


@pytest.mark.ray
def test_decorated_base_and_subclass_share_one_agent_and_run_each_init_once(make: Make) -> None:
    @rx.worker
    class Base:
        def __init__(self, value: int) -> None:
            self.ran = ["base"]
            self.seen = [rx.agent().incarnation]
            self.value = value

    @ray.remote(num_cpus=0)
    @rx.worker
    class Leaf(Base):
        def __init__(self, value: int) -> None:
            super().__init__(value)
            self.ran.append("leaf")
            self.seen.append(rx.agent().incarnation)

        def tell(self) -> tuple[list[str], int, int]:
            return self.ran, len({*self.seen, rx.agent().incarnation}), self.value

    assert get(make(Leaf, 5).tell.remote()) == (["base", "leaf"], 1, 5)


@pytest.mark.ray
def test_wrong_constructor_arguments_give_the_usual_error(cluster: str) -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'first'"):
        ray.remote(Documented).remote()
    with pytest.raises(TypeError, match="too many positional arguments"):
        ray.remote(Bare).remote(1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'third'"):
        ray.remote(Documented).remote(1, third=3)


@pytest.mark.ray
def test_async_threaded_and_grouped_actors_use_their_agent_anywhere(make: Make) -> None:
    @ray.remote(num_cpus=0, concurrency_groups={"io": 2})
    @rx.worker
    class Grouped:
        @ray.method(concurrency_group="io")
        def grouped(self) -> str:
            return rx.agent().name

        def plain(self) -> str:
            return rx.agent().name

    loop = make(AsyncHolder, options={"name": "loop", "max_concurrency": 4})
    threads = make(Holder, options={"name": "threads", "max_concurrency": 4})
    groups = make(Grouped, options={"name": "groups"})
    assert get([loop.nap.remote() for _ in range(8)]) == ["loop"] * 8
    assert len(set(get([threads.who.remote() for _ in range(8)]))) == 1
    assert get([groups.grouped.remote(), groups.plain.remote()]) == ["groups"] * 2


@pytest.mark.ray
def test_tasks_the_driver_and_actors_made_by_actors_are_peers_of_each_other(make: Make) -> None:
    @ray.remote(num_cpus=0)
    def task(name: str) -> tuple[str, int]:
        seen = rx.agent().empty(4096)
        rx.agent().read(rx.agent().peer(name)["memory"], seen).wait(timeout=10.0)
        return rx.agent().name, int(seen.array().sum())

    @ray.remote(num_cpus=0)
    @rx.worker
    class Parent:
        def __init__(self) -> None:
            self.child = Holder.options(name="child").remote(4096, fill=3)

        def read_child(self) -> int:
            seen = rx.agent().empty(4096)
            rx.agent().read(rx.agent().peer("child", timeout=30.0)["memory"], seen).wait(timeout=10.0)
            return int(seen.array().sum())

    assert get(make(Parent, options={"name": "parent"}).read_child.remote()) == 3 * 4096
    name, total = get(task.remote("child"))
    assert name.startswith("task-")
    assert total == 3 * 4096
    assert rx.agent().name == "driver"
    assert {"parent", "child", "driver"} <= {one.name for one in _listed()}


@pytest.mark.ray
def test_a_name_in_use_fails_the_second_actor_with_a_remedy(make: Make) -> None:
    get(make(Holder, options={"name": "only", "namespace": "a"}).who.remote())
    second = make(Holder, options={"name": "only", "namespace": "b"})
    with pytest.raises(ray.exceptions.ActorDiedError, match="agent name 'only' is taken by process"):
        get(second.who.remote())


def test_what_is_no_configuration_is_refused_where_it_is_written() -> None:
    with pytest.raises(rx.ConfigError, match="AgentConfig"):
        rx.worker(config={"copy_threads": 2})(Undecorated)  # type: ignore[call-overload]

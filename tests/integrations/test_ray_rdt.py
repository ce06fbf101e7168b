"""Ray Direct Transport over raynixl, in a real cluster: bytes, slices, holders, await, deaths, and nothing left."""

import asyncio
import gc
import time

import psutil
import pytest

ray = pytest.importorskip("ray")
import torch  # noqa: E402
from actor_tools import INIT, driver_environment  # noqa: E402
from agent_tools import eventually  # noqa: E402
from rdt_tools import COLUMNS, ROWS, Actor, AsyncTaker, bits, made  # noqa: E402

import raynixl as rx  # noqa: E402
from raynixl.integrations import ray_rdt  # noqa: E402
from raynixl.integrations.rdt_ray import manager_of, metadata_of  # noqa: E402

pytestmark = [
    pytest.mark.pure,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:RDT ObjectRef:UserWarning"),
]
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", driver_environment()["PYTHONPATH"])
        ray.init(address="local", **INIT)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster):
    """Two actors for the tests that do them no harm."""
    actors = [Actor.remote(), Actor.remote()]
    get([actor.__ray_ready__.remote() for actor in actors])
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def start(cluster):
    """Actors of this test's own."""
    made_here = []

    def start(**options):
        made_here.append(Actor.options(**options).remote())
        return made_here[-1]

    yield start
    for actor in made_here:
        ray.kill(actor)


def get(refs):
    return ray.get(refs, timeout=TIMEOUT)


def kill(actor):
    """Kill an actor and wait until its process has ended: Ray only asks for it."""
    process = psutil.Process(get(actor.pid.remote()))
    ray.kill(actor)
    eventually(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the actor ends")


def test_tensors_slices_and_views_of_every_kind_arrive_bit_by_bit(pair):
    source, taker = pair
    ref = source.give.remote()
    assert bits(get(ref)) == bits(made())
    assert get(taker.take.remote(ref)) == bits(made())
    assert get(source.take.remote(ref)) == bits(made())


def test_a_reference_in_a_list_is_fetched_by_whoever_gets_it(pair):
    source, taker = pair
    made_there = source.put.remote()
    assert get(taker.get.remote(made_there)) == bits(made())
    assert bits(get(get(made_there)[0])) == bits(made())


def test_the_driver_puts_for_its_actors(pair):
    ref = ray.put(made(5), _tensor_transport="raynixl")
    assert get([actor.take.remote(ref) for actor in pair]) == [bits(made(5))] * 2


def test_tensors_land_in_the_buffers_that_were_set(pair):
    targets = [torch.zeros(1 << 20, dtype=torch.int32)]
    address = targets[0].data_ptr()
    ref = pair[0].give_big.remote()
    from ray.experimental import set_target_for_ref

    pinned = ray_rdt.pin(targets)
    set_target_for_ref(ref, targets)
    (found,) = get(ref)
    pinned.release()
    assert found.data_ptr() == address
    assert torch.equal(targets[0], torch.arange(1 << 20, dtype=torch.int32))


def test_only_the_bytes_of_a_slice_move(pair):
    ref = pair[0].give.remote()
    source = get(pair[0].name.remote())
    get(ref)
    before = rx_bytes(source)
    index = [None] * 12
    index[0], index[1], index[2] = (slice(5, 9), slice(1, None, 2)), (0, -1), slice(0, 0)
    index[3:] = [slice(0, 0) if one.dim() else None for one in made()[3:]]
    found = ray_rdt.read(ref, *index)
    w = made()[0]
    assert torch.equal(found[0], w[5:9, 1::2])
    assert torch.equal(found[1], w[10:20][0, -1])
    assert rx_bytes(source) - before == 4 * COLUMNS // 2 * 4 + 4 + 8


def test_an_index_that_does_not_fit_is_refused(pair):
    ref = pair[0].give_big.remote()
    for index in [(), (slice(0, 1), slice(0, 1))]:
        with pytest.raises(rx.ConfigError, match="indices for 1 tensors"):
            ray_rdt.read(ref, *index)
    for wrong in [(0, 0), 1 << 20, slice(None, None, -1), "x"]:
        with pytest.raises(rx.ConfigError):
            ray_rdt.read(ref, wrong)
    with pytest.raises(ValueError, match="no object of a tensor transport"):
        ray_rdt.read(ray.put(1), 0)


def rx_bytes(peer):
    return sum(route.nbytes for route in rx.agent().statistics().routes if route.peer == peer)


def test_a_reference_is_awaited_by_the_driver_and_by_an_async_actor(pair):
    source, _ = pair

    async def both():
        return await asyncio.wait_for(asyncio.gather(source.give.remote(1), source.give.remote(2)), TIMEOUT)

    assert [bits(one) for one in asyncio.run(both())] == [bits(made(1)), bits(made(2))]
    taker = AsyncTaker.remote()
    assert get(taker.take.remote(source)) == bits(made(3))
    ray.kill(taker)


def test_a_method_that_fails_tells_whoever_waits_or_awaits(pair):
    async def await_failure():
        await asyncio.wait_for(pair[0].fail.remote(), TIMEOUT)

    with pytest.raises(KeyError, match="nothing to give"):
        asyncio.run(await_failure())
    with pytest.raises(KeyError, match="nothing to give"):
        get(pair[0].fail.remote())


def test_nothing_stays_when_references_go_out_of_scope(pair):
    source, taker = pair
    ref = source.give.remote()
    get([taker.take.remote(ref), taker.take.remote(ref)])
    get(ref)
    assert get(source.held.remote())[0] > 0
    del ref
    assert get(taker.get_many.remote(source, 12)) <= 2
    eventually(lambda: get(source.held.remote()) == (0, 0), "the source lets go of memory and objects")
    assert get(taker.held.remote()) == (0, 0)
    assert len(manager_of("raynixl").desk().shelf) == 0
    assert manager_of("raynixl")._flights == {}


def test_registering_again_changes_nothing(pair):
    before = manager_of("raynixl")
    ray_rdt.register()
    ray_rdt.register()
    assert manager_of("raynixl") is before
    assert (before.can_abort_transport(), before.is_one_sided()) == (True, True)


def test_a_source_that_is_dead_is_a_typed_error_at_once(start, pair):
    source = start()
    ref = source.give_big.remote()
    ray.wait([ref], timeout=TIMEOUT)
    taken = get(pair[1].take.remote(ref))
    assert taken[0][1] == (1 << 20,)
    kill(source)
    began = time.monotonic()
    with pytest.raises((rx.PeerLost, rx.PeerUnknown)):
        get(ref)
    with pytest.raises((rx.PeerLost, rx.PeerUnknown)):
        get(pair[1].take.remote(ref))
    assert time.monotonic() - began < 20
    assert bits(get(pair[0].give.remote())) == bits(made())  # nobody else was harmed


def test_several_holders_share_the_reads_and_outlive_the_source(start, pair):
    source, holder, taker = start(), pair[0], pair[1]
    refs = [source.give_big.remote()]
    assert get(refs[0])[0].numel() == 1 << 20
    del refs[:]
    refs = get(source.put.remote())
    assert get(holder.hold.remote(refs))
    names = get([source.name.remote(), holder.name.remote()])
    before = get(taker.read_from.remote()).get(names[1], 0)
    for _ in range(4):
        assert get(taker.get.remote(refs)) == bits(made())
    read = get(taker.read_from.remote())
    assert read[names[1]] - before > ROWS * COLUMNS * 4  # two of the four
    assert read[names[0]] > ROWS * COLUMNS * 4
    kill(source)
    assert get(taker.get.remote(refs)) == bits(made())
    assert bits(get(refs[0])) == bits(made())
    get(holder.let_go.remote())
    with pytest.raises((rx.PeerLost, rx.PeerUnknown)):
        get(refs[0])
    assert get(holder.held.remote()) == (0, 0)


def test_what_is_not_the_object_is_not_held(pair):
    ref = pair[0].give_big.remote()
    with pytest.raises(rx.ConfigError, match="not the object's tensors"):
        ray_rdt.hold(ref, [torch.zeros(3)])


def test_an_actor_that_restarts_gives_again(start):
    source = start(max_restarts=1, max_task_retries=0)
    assert bits(get(source.give.remote(4))) == bits(made(4))
    with pytest.raises(ray.exceptions.RayActorError):
        get(source.exit.remote())

    def gives():
        try:
            return bits(get(source.give.remote(6))) == bits(made(6))
        except ray.exceptions.RayActorError:
            return False

    eventually(gives, "the restarted actor gives")


def test_a_fetch_that_nobody_waits_for_is_ended_by_the_next(pair):
    transport = manager_of("raynixl")
    ref = pair[0].give_big.remote()
    meta = metadata_of(ref, TIMEOUT)
    fetch = transport.fetch_multiple_tensors(ref.hex(), meta, None)
    assert len(transport.desk().shelf) == 1
    del fetch
    gc.collect()
    get(ref)
    assert len(transport.desk().shelf) == 0
    assert transport._flights == {}


def test_a_fetch_of_which_the_time_runs_out_is_a_timeout(pair):
    class Slow:
        jobs = ()
        done = False

        def wait(self, timeout):
            raise rx.TransferTimeout(f"not within {timeout} s")

        def cancel(self):
            return True

    transport = manager_of("raynixl")
    ref = pair[0].give_big.remote()
    fetch = transport.fetch_multiple_tensors(ref.hex(), metadata_of(ref, TIMEOUT), None)
    fetch.flight.transfer.wait()
    fetch.flight.transfer = Slow()
    with pytest.raises(TimeoutError):
        transport.wait_fetch_complete(fetch, 0.01)


def test_aborting_ends_what_is_under_way_and_no_more(pair):
    transport = manager_of("raynixl")
    ref = pair[0].give_big.remote()
    get(ref)
    transport.abort_transport(ref.hex(), None)
    assert get(ref)[0].numel() == 1 << 20

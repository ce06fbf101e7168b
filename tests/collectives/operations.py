"""What the members of a group do in the tests; runs in member processes, so it imports nothing heavy."""

import numpy as np


def pattern(seed, nbytes):
    """Bytes that differ from place to place."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def broadcast(groups, root, algorithm, nbytes):
    """Broadcast; say whether the bytes are right."""
    group = groups[-1]
    buffer = pattern(7, nbytes) if group.rank == root else np.zeros(nbytes, np.uint8)
    group.broadcast(buffer, root, algorithm=algorithm)
    return bool((buffer == pattern(7, nbytes)).all())


def all_operations(groups, salt=0):
    """Run every operation with parts of different lengths, one of them empty; return the rank."""
    group = groups[-1]
    sizes = [0 if rank == 1 else 1000 * rank + 13 for rank in range(group.world)]
    parts = [pattern(salt + rank, nbytes) for rank, nbytes in enumerate(sizes)]
    whole = np.concatenate(parts)
    mine, everything = parts[group.rank], np.zeros(sum(sizes), np.uint8)
    group.allgather(mine, everything)
    assert (everything == whole).all()
    group.barrier()
    root = group.world - 1
    out = np.zeros(len(mine), np.uint8)
    group.scatter(whole if group.rank == root else None, out, root)
    assert (out == mine).all()
    everything[:] = 0
    group.gather(mine, everything if group.rank == 0 else None, 0)
    assert group.rank != 0 or (everything == whole).all()
    return group.rank


def broadcast_on_gpus(groups, root, algorithm, nbytes, sorts):
    """Broadcast between memories of these sorts, one for each rank in turn; say whether the bytes are right."""
    from vram_tools import content, make_region

    group = groups[-1]
    seed = 7 if group.rank == root else 0
    region = make_region(group.agent, sorts[group.rank % len(sorts)], nbytes, seed=seed)
    group.broadcast(region, root, algorithm=algorithm)
    right = bool((content(region) == pattern(7, nbytes)).all())
    group.agent.deregister(region)
    return right


def all_operations_on_gpus(groups, sorts):
    """Run every operation with buffers of these sorts, in turn; return the rank."""
    from vram_tools import content, make_region

    group, made = groups[-1], []

    def region(nbytes, seed=0):
        sort = sorts[(group.rank + len(made)) % len(sorts)]
        made.append(make_region(group.agent, sort, nbytes, seed=seed))
        return made[-1]

    sizes = [0 if rank == 1 else 100_000 * rank + 13 for rank in range(group.world)]
    whole = np.concatenate([pattern(1 + rank, nbytes) for rank, nbytes in enumerate(sizes)])
    mine = region(sizes[group.rank], 1 + group.rank) if sizes[group.rank] else None
    everything, root = region(sum(sizes)), group.world - 1
    group.allgather(mine, everything)
    assert (content(everything) == whole).all()
    out = region(sizes[group.rank]) if mine is not None else None
    group.scatter(everything if group.rank == root else None, out, root)
    assert out is None or (content(out) == content(mine)).all()
    again = region(sum(sizes))
    group.gather(mine, again if group.rank == 0 else None, 0)
    assert group.rank != 0 or (content(again) == whole).all()
    group.barrier()
    for one in made:
        group.agent.deregister(one)
    return group.rank


def many_times(groups, times):
    """Run every operation again and again with buffers that are freed in between."""
    for salt in range(times):
        all_operations(groups, salt)
    return True


def barrier(groups):
    """Come to the barrier."""
    groups[-1].barrier()


def without(groups, member):
    """Go on without a member."""
    groups.append(groups[-1].without(member))
    return all_operations(groups)

"""Group members in threads and in processes of their own, for the tests."""

import multiprocessing
import os
import signal
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

from raynixl import Agent, AgentConfig, InMemoryDirectory
from raynixl.collectives import Group

DEADLINE = 30.0


def in_threads(world, work, *, config=None, timeout=DEADLINE):
    """Run work(group) on every rank, each with an agent and a thread of its own; return what each returns or raises."""
    directory = InMemoryDirectory()
    agents = [Agent(f"m{rank}", config=config or AgentConfig(), directory=directory) for rank in range(world)]
    names = [agent.name for agent in agents]

    def run(agent):
        with Group(agent, names, name="test", timeout=timeout) as group:
            return work(group)

    try:
        with ThreadPoolExecutor(world) as pool:
            return [future.result(60) for future in [pool.submit(run, agent) for agent in agents]]
    finally:
        for agent in agents:
            agent.close()


class Members:
    """Processes that each hold one member; told by pipe what to run."""

    def __init__(self, world, *, timeout=DEADLINE, **config):
        context = multiprocessing.get_context("spawn")
        self.names = [f"p{rank}" for rank in range(world)]
        self.pipes, self.processes = [], []
        for name in self.names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name, self.names, timeout, config), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        records = [self.hear(rank) for rank in range(world)]
        for pipe in self.pipes:
            pipe.send(records)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for rank, (pipe, process) in enumerate(zip(self.pipes, self.processes, strict=True)):
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
                self.tell(rank, None)
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
            pipe.close()

    def tell(self, rank, work, *args):
        try:
            self.pipes[rank].send((work, args))
        except OSError:
            return

    def hear(self, rank, timeout=60):
        assert self.pipes[rank].poll(timeout), f"member {rank} says nothing"
        return self.pipes[rank].recv()

    def run(self, work, *args, ranks=None):
        """Run work(group, *args) on the ranks; return (value, error name, error peer) of each."""
        ranks = range(len(self.names)) if ranks is None else ranks
        for rank in ranks:
            self.tell(rank, work, *args)
        return [self.hear(rank) for rank in ranks]


def _serve(pipe, name, names, timeout, config):
    if "nvlink" in config.get("backends", ()):
        import cuda_fake
        import cuda_kernels

        cuda_kernels.register(cuda_fake.install())
    with Agent(name, config=AgentConfig(**config)) as agent:
        pipe.send(agent.record())
        for record in pipe.recv():
            agent.peer(record)
        groups = [Group(agent, names, name="test", timeout=timeout)]
        while True:
            work, args = pipe.recv()
            if work is None:
                break
            try:
                pipe.send((work(groups, *args), "", ""))
            except Exception as exc:  # noqa: BLE001 - process edge: the parent gets it
                pipe.send((traceback.format_exc(), type(exc).__name__, getattr(exc, "peer", "")))
        for group in groups:
            group.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("raynixl")]

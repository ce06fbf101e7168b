"""A process with one agent that takes part in expert parallelism as it is told; see `moe_tools.Processes`."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import sys
import threading
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from agent_tools import make_agent
from weights_nursery import serve

from raynixl.backends.ucx_runtime import load_ucxx
from raynixl.errors import BackendUnavailable

NEEDED = (
    "moe_autograd", "moe_far", "moe_programs", "raynixl.backends.shm", "raynixl.backends.ucx",
    "raynixl.backends.ucx_network",
)  # fmt: skip
"""What calls and agents import, once for all children."""


class Child:
    """The commands; functions that are called get it as their member."""

    def __init__(self, label, send):
        name, _, backends = label.partition("+")
        torch.set_num_threads(1)
        self.agent = make_agent(name, backends=tuple(backends.split(",")))
        self.say = send
        self.rank = -1
        self.groups, self.eps, self.kept = {}, {}, {}

    def meet(self, records):
        for record in records:
            if bytes.fromhex(record) != self.agent.record():
                self.agent.peer(bytes.fromhex(record))
        return True

    def call(self, function, rank, args):
        """Run 'module:function'; answer (value, None), or (trace, error)."""
        self.rank = rank
        module, _, name = function.partition(":")
        try:
            work = getattr(importlib.import_module(module), name)
            given, options = pickle.loads(bytes.fromhex(args))
            return pickle.dumps((work(self, *given, **options), None)).hex()
        except Exception as error:  # noqa: BLE001 - the edge of the process: the parent raises it
            return pickle.dumps((traceback.format_exc(), error)).hex()

    def leave(self):
        """Close everything; tell the threads of ours that are left."""
        self.kept.clear()
        for each in [*self.eps.values(), *self.groups.values(), self.agent]:
            each.close()
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("raynixl")]


for name in NEEDED:
    importlib.import_module(name)
with contextlib.suppress(BackendUnavailable):
    load_ucxx()
serve(Child)

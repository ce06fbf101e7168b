"""Whoever drives UCX in a process with memory on a GPU does so in a CUDA context: UCX asks CUDA about events there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import warm

from raynixl.native import load

pytestmark = [
    pytest.mark.pure,
    pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"),
]

# In a process of its own, since a context is entered once for the process. The driver is a fake, whose context of a
# thread is a name in a table; thread ids are those of the kernel.
CODE = """
    import ctypes, json, sys, threading
    import numpy as np
    from native_tools import finish
    from rail_tools import Side
    from raynixl.native import DONE, load

    current = {int(sys.argv[2]) and threading.get_native_id(): 7}
    asked = set()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
    def get_current(into):
        asked.add(threading.get_native_id())
        into[0] = current.get(threading.get_native_id())
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def set_current(context):
        current[threading.get_native_id()] = context
        return 0

    core = load(sys.argv[1] == "native")
    assert core.NAME == sys.argv[1]
    addresses = [ctypes.cast(one, ctypes.c_void_p).value for one in (get_current, set_current)]
    core.enter_cuda(0xC0, *addresses)
    core.enter_cuda(0xDEAD, *addresses)  # the first one counts
    side = Side(core, "tcp")
    try:
        source, sink = np.arange(1 << 20, dtype=np.uint8), np.zeros(1 << 20, dtype=np.uint8)
        assert finish(side.writer(source, side.reach(side.export(sink))).run(30.0)) == DONE
        assert (source == sink).all()
        if core.NAME == "ctypes":
            side.rail.progress()  # UCX's own thread may have left us nothing to drive
    finally:
        side.close()
    mine = threading.get_native_id()
    others = [context for thread, context in current.items() if thread not in (0, mine)]
    print(json.dumps({"mine": current.get(mine), "others": others, "asked": len(asked)}))
"""


@pytest.mark.parametrize("core", ["native", "ctypes"])
@pytest.mark.parametrize(("has_own", "context"), [(0, 0xC0), (1, 7)], ids=["none", "own"])
def test_a_thread_without_a_context_takes_the_one_that_was_entered(core: str, has_own: int, context: int) -> None:
    found = load(core == "native").NAME
    if found != core:
        pytest.skip("the core is not built")
    tests = Path(__file__).parents[1]
    path = f"import sys; sys.path[:0] = [{str(tests)!r}]\n"
    argv = [sys.executable, "-c", path + textwrap.dedent(CODE), core, str(has_own)]
    child = warm.popen(argv, stdout=subprocess.PIPE, text=True)
    with child.stdout:
        said = child.stdout.read()
    assert child.wait(60.0) == 0, said
    told = json.loads(said)
    assert told["mine"] == context
    assert told["others"] == ([0xC0] if core == "native" else []), "the core's own thread takes it, where there is one"
    assert told["asked"] == (2 if core == "native" else 1), "each thread asks once"

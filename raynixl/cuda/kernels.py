"""Kernels: code loaded, functions found in it, and their launch. What is launched often is packed by the core."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import Any

from raynixl.cuda.library import check

Size = tuple[int, int, int]


def module_load(image: bytes) -> int:
    """Load compiled code (cubin, fatbin or PTX) into the current context. To be unloaded, or kept for good.

    Raises:
        BackendUnavailable: it is for another kind of GPU, or a newer driver.
    """
    module = c_void_p()
    text = ctypes.create_string_buffer(image)  # PTX must end with a zero byte
    check("cuModuleLoadData", byref(module), text, what=f"{len(image)} bytes of code")
    return module.value or 0


def module_unload(module: int) -> None:
    """Unload code; none of it runs any more."""
    check("cuModuleUnload", module)


def module_function(module: int, name: str) -> int:
    """Return a kernel of a module, by the name that it has there."""
    function = c_void_p()
    check("cuModuleGetFunction", byref(function), module, name.encode(), what=repr(name))
    return function.value or 0


def launch(
    function: int, grid: Size, block: Size, arguments: Sequence[Any], stream: int, *, shared_nbytes: int = 0
) -> None:
    """Start a kernel on a stream, in the current context; `arguments` are ctypes objects, copied before it returns."""
    packed = (c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
    check("cuLaunchKernel", function, *grid, *block, shared_nbytes, stream, packed, None)

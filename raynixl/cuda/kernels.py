"""Kernels: code loaded, functions found in it, and their launch; once, or many times with arguments packed once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import Any

from raynixl.cuda.contexts import current
from raynixl.cuda.library import check, current_driver, failure

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


def pack(arguments: Sequence[Any]) -> Any:
    """Return what CUDA takes for arguments: the addresses of these ctypes objects, which must stay alive."""
    return (c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))


def launch(
    function: int, grid: Size, block: Size, arguments: Sequence[Any], stream: int, *, shared_nbytes: int = 0
) -> None:
    """Start a kernel on a stream, in the current context; `arguments` are ctypes objects, copied before it returns."""
    check("cuLaunchKernel", function, *grid, *block, shared_nbytes, stream, pack(arguments), None)


class Launch:
    """A kernel that is started many times: everything packed once.

    Change an argument between launches in place (`launch.arguments[2].value = 7`); one thread at a time.
    """

    __slots__ = ("_before", "_context", "_get_current", "_launch", "_packed", "arguments")

    def __init__(
        self,
        context: int,
        function: int,
        grid: Size,
        block: Size,
        arguments: Sequence[Any],
        *,
        shared_nbytes: int = 0,
    ) -> None:
        library = current_driver().library
        self.arguments = tuple(arguments)
        self._context = context
        self._packed = pack(self.arguments)
        self._before = (c_void_p(function), *grid, *block, shared_nbytes)
        self._launch, self._get_current = library.cuLaunchKernel, library.cuCtxGetCurrent

    def run(self, stream: int) -> None:
        """Start it on a stream of its context, which becomes current meanwhile if it is not.

        Raises:
            ConfigError, BackendUnavailable: as CUDA says.
        """
        now = c_void_p()
        if self._get_current(byref(now)) == 0 and now.value == self._context:
            code = self._launch(*self._before, stream, self._packed, None)
        else:
            with current(self._context):
                code = self._launch(*self._before, stream, self._packed, None)
        if code:
            raise failure(code, "cuLaunchKernel")

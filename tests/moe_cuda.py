"""Expert parallelism on GPUs that are made up: memory of the fake driver, kernels compiled for the host, plain tensors.

Every tensor counts as on GPU 0, but for those that a thread works with inside of `on_host`. A kernel runs in a thread
of its own, so that ranks in threads of one process wait for each other as on GPUs. Unless a test says otherwise, who
launches waits for the kernel's end, as torch's own work on a stream would.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cuda_fake
import cuda_kernels
import torch
from cuda_fake import FakeCuda
from moe_kernels_host import library, run_kernel

from raynixl import cuda
from raynixl.moe import cuda_device, cuda_structs

STRUCTS = {
    "send": cuda_structs.Send, "arrive": cuda_structs.Arrive, "order": cuda_structs.Order, "take": cuda_structs.Take,
    "give": cuda_structs.Give, "sum": cuda_structs.Sum, "mask": cuda_structs.Mask,
}  # fmt: skip
_THREADS, _CTAS = 64, 8
_POISON = 0xCD


class MadeUp:
    """The GPUs of this process, for `moe_cuda.made_up`."""

    def __init__(self, fake: FakeCuda, *, is_patient: bool = True, is_everywhere: bool = True) -> None:
        library()
        self.fake = fake
        self.is_everywhere = is_everywhere
        """Whether tensors of all threads are on the GPU; else those of threads with a stream that was given to them."""
        self.is_patient = is_patient
        """Whether who launches a kernel waits for its end."""
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="fake-kernel")
        self._local = threading.local()
        self._launch = cuda.launch
        self._streams: list[int] = []
        self.kept: list[torch.Tensor] = []
        self.brought: set[int] = set()
        """Where tensors lie that were brought from memory of the host."""
        self.at_host: list[torch.Tensor] = []
        """Tensors that count as in memory of the host, whoever has them."""
        for kind, struct in STRUCTS.items():
            fake.kernel(f"raynixl_moe_{kind}", struct)(self._runner(kind))

    def _runner(self, kind: str) -> Callable[..., Iterator[None]]:
        def run(_gpu: Any, grid: tuple[int, int, int], arguments: ctypes.Structure) -> Iterator[None]:
            threads = 32 if kind == "mask" else _THREADS
            running = self._pool.submit(run_kernel, f"raynixl_moe_{kind}", min(grid[0], _CTAS), threads, arguments)
            running.add_done_callback(lambda _: self._ring())
            while not running.done():
                yield None
            running.result()

        return run

    def _ring(self) -> None:
        with self.fake.lock:
            self.fake.work.wake()

    def stream(self) -> int:
        """This thread's current stream."""
        if not hasattr(self._local, "stream"):
            self._local.stream = self.another()
            self._streams.append(self._local.stream)
        return int(self._local.stream)

    def another(self) -> int:
        """A stream of its own."""
        return int(self.fake.work.stream(self.fake.devices.retain(0)))

    @contextlib.contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Make another stream this thread's current one."""
        before = self.stream(), getattr(self._local, "is_on_gpu", False)
        self._local.stream, self._local.is_on_gpu = stream, True
        try:
            yield
        finally:
            self._local.stream, self._local.is_on_gpu = before

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Have tensors of this thread count as in memory of the host."""
        self._local.is_on_host = True
        try:
            yield
        finally:
            self._local.is_on_host = False

    def gpu_of(self, tensor: Any) -> int | None:
        """Where a tensor is."""
        is_here = self.is_everywhere or getattr(self._local, "is_on_gpu", False)
        is_there = isinstance(tensor, torch.Tensor) and not getattr(self._local, "is_on_host", False)
        is_there = is_there and not any(tensor is one for one in self.at_host)
        return 0 if is_here and is_there else None

    def launch(self, function: int, grid: Any, block: Any, arguments: Sequence[Any], stream: int, **more: Any) -> None:
        """Start a kernel, and wait for its end if that is wanted."""
        self._launch(function, grid, block, arguments, stream, **more)
        work = self.fake.work
        with self.fake.lock:
            found = work.streams.get(stream)
            while self.is_patient and found is not None and found.pieces and found.captured is None:
                self.fake.changed.wait(0.001)
                if not found.pieces:
                    break
                work.wake()

    def settle(self) -> None:
        """Wait until nothing is left on this thread's stream."""
        found = self.fake.work.streams[self.stream()]
        with self.fake.lock:
            while found.pieces:
                self.fake.changed.wait(0.001)
                self.fake.work.wake()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class StandInGpu:
    """In place of `TorchGpu`."""

    def __init__(self, made_up: MadeUp, number: int) -> None:
        self.number = number
        self._made_up = made_up

    def stream(self) -> int:
        return self._made_up.stream()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(tuple(shape), dtype=dtype)
        if made.numel():
            made.view(-1).view(torch.uint8).fill_(_POISON)
        if not self._made_up.is_patient:
            self._made_up.kept.append(made)  # torch gives memory again in the order of streams, the host at once
        return made

    def use(self, tensors: Any) -> None:
        """Everything is kept already."""

    def put(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array.copy())

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.fetch_all([tensor])[0]

    def fetch_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.finish()
        return [one.detach().clone() for one in tensors]

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.detach().clone()
        self._made_up.brought.add(made.data_ptr())
        return made

    def finish(self) -> None:
        self._made_up.settle()

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def here(self) -> Callable[[], Any]:
        stream = self._made_up.stream()
        return lambda: self._made_up.on_stream(stream)

    def another(self) -> int:
        return self._made_up.another()

    def on(self, stream: int) -> Any:
        return self._made_up.on_stream(stream)


@contextlib.contextmanager
def made_up(*, is_patient: bool = True, is_everywhere: bool = True, gpus: int = 1) -> Iterator[MadeUp]:
    """GPUs in this process, which fail the test for every misuse of the driver and for what is not given back."""
    fake = cuda_fake.install(is_host=True, gpus=gpus)
    cuda_kernels.register(fake)
    fake.work.patience = 60.0
    made = MadeUp(fake, is_patient=is_patient, is_everywhere=is_everywhere)
    stand_ins = [StandInGpu(made, number) for number in range(gpus)]
    kept = cuda.launch, cuda_device.gpu_of, cuda_device.gpu, cuda_device.used_gpu
    cuda.launch, cuda_device.gpu_of = made.launch, made.gpu_of
    cuda_device.gpu, cuda_device.used_gpu = stand_ins.__getitem__, lambda: 0
    try:
        yield made
        fake.finish()
    except BaseException:
        fake.discard()
        raise
    finally:
        cuda.launch, cuda_device.gpu_of, cuda_device.gpu, cuda_device.used_gpu = kept
        made.close()

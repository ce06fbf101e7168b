"""Another process with a fake CUDA driver: it makes memory, exports it, and dies when told to.

The near side is `FarCuda`; run as a script it is the far side, which answers one line of JSON with another.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import cuda_fake
import cuda_scenes
import warm

from raynixl import cuda
from raynixl.backends.nvlink_export import export
from raynixl.cuda import Origin
from raynixl.memory import Memory, MemoryKind


class FarCuda:
    """The other process, as a context manager. Whatever is asked is a method of `Far`."""

    def __init__(self, **settings: Any) -> None:
        self._process = warm.popen(
            [sys.executable, __file__, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> FarCuda:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            said = self.ask("finish")
            self._process.wait(10)
            assert said == "", said
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def ask(self, do: str, **fields: Any) -> Any:
        """Have something done there."""
        if do.startswith("far_"):
            do, fields = "scene", {"scene": do, **fields}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        """End it with no chance to clean up."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)


class Far:
    """The far side."""

    def __init__(self, **settings: Any) -> None:
        self.fake = cuda_fake.install(**settings)
        self.arenas: dict[str, cuda.Arena] = {}
        self.streams: dict[str, tuple[int, int]] = {}

    def scene(self, scene: str, **fields: Any) -> Any:
        """Do the far part of a scene of `cuda_scenes`."""
        return getattr(cuda_scenes, scene)(**fields)

    def arena(self, name: str, nbytes: int, device: int = 0) -> None:
        """Make memory of ours."""
        self.arenas[name] = cuda.arena(nbytes, device)

    def make(self, nbytes: int, origin: str, chunks: tuple[int, ...] = (), handle_types: int = 0) -> int:
        """Make memory as torch does."""
        return self.fake.make(nbytes, origin=Origin[origin], chunks=tuple(chunks), handle_types=handle_types)

    def key(self, name: str, offset: int = 0, nbytes: int = 1) -> dict[str, str | int]:
        """Export a part of an arena."""
        return self.key_at(self.arenas[name].address + offset, nbytes)

    def key_at(self, address: int, nbytes: int) -> dict[str, str | int]:
        """Export memory by address."""
        return export(Memory(MemoryKind.VRAM, 0, address, nbytes, True, None))

    def fill(self, name: str, offset: int, text: str) -> None:
        """Write into an arena."""
        self.fill_at(self.arenas[name].address + offset, text)

    def fill_at(self, address: int, text: str) -> None:
        """Write to an address."""
        self.fake.view(address, len(text))[:] = list(text.encode())

    def read(self, name: str, offset: int, nbytes: int) -> str:
        """Read from an arena."""
        return bytes(self.fake.view(self.arenas[name].address + offset, nbytes)).decode()

    def free(self, name: str) -> None:
        """Free an arena."""
        self.arenas.pop(name).close()

    def event(self, name: str) -> str:
        """Record an event after work that is held, and return its handle."""
        with cuda.on(0):
            stream, event = cuda.stream_create(), cuda.event_create(is_shared=True)
            self.fake.work.mode = cuda_fake.Mode.HELD
            cuda.event_record(event, stream)
            self.streams[name] = (stream, event)
            return cuda.ipc_export_event(event).hex()

    def release(self, name: str) -> None:
        """Let the held work run, and destroy stream and event."""
        self.fake.release()
        stream, event = self.streams.pop(name)
        with cuda.on(0):
            cuda.stream_destroy(stream)
            cuda.event_destroy(event)

    def finish(self) -> str:
        """End; say what was wrong."""
        self.arenas.clear()
        try:
            self.fake.finish()
        except AssertionError as exc:
            return str(exc)
        return ""


def main() -> None:
    """Answer until told to finish."""
    far = Far(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        fields = json.loads(line)
        do = fields.pop("do")
        print(json.dumps(getattr(far, do)(**fields)), flush=True)
        if do == "finish":
            return


if __name__ == "__main__":
    main()

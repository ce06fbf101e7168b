"""The far process of the GPU tests: an agent with regions on a GPU or in host memory, asked by JSON lines on a pipe."""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import cupy
import numpy as np
import xxhash

from raynixl import Agent, AgentConfig


def filled(kind: str, nbytes: int, seed: int) -> Any:
    """Memory of a kind that holds what nobody else's does; seed 0: zeros."""
    source = (
        np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8) if seed else np.zeros(nbytes, np.uint8)
    )
    if kind == "host":
        return source
    if kind == "torch":
        import torch

        return torch.from_numpy(source).cuda()
    made = cupy.asarray(source)
    cupy.cuda.Stream.null.synchronize()
    return made


def content(array: Any) -> Any:
    """The bytes of any kind of memory, here."""
    if hasattr(array, "cpu"):
        return array.cpu().numpy()
    return cupy.asnumpy(array)


def digest(array: Any) -> str:
    """A digest that notices every changed, moved or missing byte."""
    return xxhash.xxh3_128_hexdigest(content(array).tobytes())


def main(options: dict[str, str]) -> None:
    """Answer until the pipe closes."""
    memories: dict[str, Any] = {}
    with Agent("far", config=AgentConfig(backends=("ucx",), ucx=options)) as agent:
        print(json.dumps({"record": base64.b64encode(agent.record()).decode()}), flush=True)
        for line in sys.stdin:
            ask = json.loads(line)
            name, reply = ask["name"], {}
            if ask["do"] == "make":
                memories[name] = filled(ask["kind"], ask["nbytes"], ask["seed"])
                agent.register(memories[name], name=name)
            reply["digest"] = digest(memories[name])
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""A fake CUDA driver that knows our kernels, for a while; tests have it as the fixture `fake_cuda`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import cuda_fake
import cuda_kernels
from cuda_fake import FakeCuda


@contextlib.contextmanager
def fake_driver(**settings: Any) -> Iterator[FakeCuda]:
    """Put a fake driver in CUDA's place meanwhile; raises on every misuse and on what was not given back."""
    fake = cuda_fake.install(**settings)
    cuda_kernels.register(fake)
    try:
        yield fake
    except BaseException:
        fake.discard()
        raise
    fake.finish()

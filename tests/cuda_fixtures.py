"""Fixtures for tests that need a CUDA driver: import them where they are used."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_fake
import cuda_kernels
import pytest
from cuda_fake import FakeCuda


@pytest.fixture
def fake_cuda() -> Iterator[FakeCuda]:
    """A fake driver of two GPUs that knows our kernels; misuse and what is not given back fail the test."""
    fake = cuda_fake.install()
    cuda_kernels.register(fake)
    yield fake
    fake.finish()

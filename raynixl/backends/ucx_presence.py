"""Whether UCX and CUDA are there, found out without loading more than that takes."""

from __future__ import annotations

import ctypes
import importlib.util

INSTALL = "pip install 'raynixl[ucx]' (with a GPU: raynixl[cu13] or [cu12])"


def is_installed() -> bool:
    """Whether ucxx can be imported; does not import it."""
    return importlib.util.find_spec("ucxx") is not None


def has_cuda() -> bool:
    """Whether this host has a driver for NVIDIA GPUs; loads nothing else."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True

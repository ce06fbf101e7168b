"""Whether UCX is there, found out without loading it."""

from __future__ import annotations

import importlib.util

INSTALL = "pip install 'raynixl[ucx]' (with a GPU: raynixl[cu13] or [cu12])"


def is_installed() -> bool:
    """Whether ucxx can be imported; does not import it."""
    return importlib.util.find_spec("ucxx") is not None

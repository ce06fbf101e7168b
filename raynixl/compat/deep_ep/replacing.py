"""Replacing: `import deep_ep` leads here, for code that cannot be changed."""

from __future__ import annotations

import importlib
import sys

from raynixl.errors import ConfigError

_MODULES = {
    "deep_ep": "raynixl.compat.deep_ep",
    "deep_ep.utils": "raynixl.compat.deep_ep.utils",
    "deep_ep.buffer": "raynixl.compat.deep_ep.buffer",
    "deep_ep.buffers": "raynixl.compat.deep_ep",
    "deep_ep.buffers.legacy": "raynixl.compat.deep_ep.buffer",
    "deep_ep.buffers.elastic": "raynixl.compat.deep_ep.elastic",
    "deep_ep.utils.event": "raynixl.compat.deep_ep.events",
    "deep_ep.utils.math": "raynixl.compat.deep_ep.utils",
    "deep_ep.utils.envs": "raynixl.compat.deep_ep.domains",
}


def install() -> None:
    """Make every later `import deep_ep` of this process import raynixl's. Call it before the code that does.

    Raises:
        ConfigError: DeepEP itself has been imported.
    """
    for name in _MODULES:
        module = sys.modules.get(name)
        if module is not None and not module.__name__.startswith("raynixl."):
            raise ConfigError(f"{name} is imported already, from {module.__file__}", hint="call install() before that")
    for name, home in _MODULES.items():
        sys.modules[name] = importlib.import_module(home)

"""The directory: where agent records are published and found."""

from raynixl.directory.memory import InMemoryDirectory
from raynixl.directory.protocol import Directory

__all__ = ["Directory", "InMemoryDirectory"]

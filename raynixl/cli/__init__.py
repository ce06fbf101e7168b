"""The `raynixl` command: doctor, agents, bench, version."""

from raynixl.cli.main import app

__all__ = ["app"]

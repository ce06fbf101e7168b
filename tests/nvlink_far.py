"""What the GPU tests of nvlink ask of the far process besides what it offers them all."""

from __future__ import annotations

from gpu_far import PATIENCE, World, digest


def digest_at_notification(world: World, name: str) -> list[str]:
    """Wait for a notification; say it, and the digest of a region at that moment."""
    note = world.agent.wait_notification(PATIENCE)
    return [note.payload.decode(), digest(world.regions[name])]


def make_bare(world: World, names: list[str], nbytes: int) -> None:
    """Make arenas on the GPU, of zeros."""
    for name in names:
        world.regions[name] = world.agent.empty(nbytes, kind="vram", name=name)


def drop_all(world: World, names: list[str]) -> None:
    """Deregister them and let go of their memory."""
    for name in names:
        world.agent.deregister(world.regions.pop(name))

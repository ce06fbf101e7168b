"""Collectives: broadcast, scatter, gather, allgather and barrier, made of one-sided reads and short messages."""

from raynixl.collectives.group import Group

__all__ = ["Group"]

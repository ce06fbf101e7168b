"""Backends: each carries transfers, and maybe messages, over one kind of path."""

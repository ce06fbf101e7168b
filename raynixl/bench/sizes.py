"""Sizes as people write them: 4K, 1M, 1.5G, in powers of 1024."""

from __future__ import annotations

import re

from raynixl.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `text` means.

    Raises:
        ConfigError: it is not a size of at least one whole byte.
    """
    found = _SIZE.fullmatch(text.strip())
    nbytes = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    if nbytes < 1 or nbytes != int(nbytes):
        raise ConfigError(f"{text!r} is not a size", hint="write bytes, or 4K, 1M, 2G (powers of 1024)")
    return int(nbytes)


def parse_sizes(text: str) -> list[int]:
    """Return the bytes of each size in a list separated by commas."""
    return [parse_size(part) for part in text.split(",")]


def parse_counts(text: str, most: int = 64) -> list[int]:
    """Return the numbers in a list separated by commas.

    Raises:
        ConfigError: one is not a whole number of 1 to `most`.
    """
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= most for count in counts):
        raise ConfigError(f"{text!r} are not numbers of 1 to {most}", hint="write 4, or 1,2,4")
    return counts


def parse_gpus(text: str) -> tuple[int, int]:
    """Return the numbers of two GPUs: the same for both where one is named.

    Raises:
        ConfigError: it is not one number or two.
    """
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{text!r} are no GPUs", hint="write 0, or ours and the target's as 0,1")
    return int(parts[0]), int(parts[-1])


def format_size(nbytes: int) -> str:
    """Return bytes as people write them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes} B"

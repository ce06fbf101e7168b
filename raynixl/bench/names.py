"""Names of baselines: what every benchmark checks before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raynixl.errors import ConfigError


def check_baselines(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse baselines that a benchmark does not have.

    Raises:
        ConfigError: names the first, and those that there are.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no baseline {name!r}", hint=f"known are: {', '.join(known)}")

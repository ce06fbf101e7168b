"""Conformance: runs the checks on a backend and reports how each one went."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raynixl.backends.table import Factory
from raynixl.config import AgentConfig
from raynixl.errors import RaynixlError
from raynixl.testing import byte_checks, life_checks, message_checks, plain_checks
from raynixl.testing.places import Far, Place, far_side
from raynixl.testing.scene import Scene, Unreached

_CHECKS: dict[str, Callable[[Scene], None]] = {
    check.__name__: check for part in (plain_checks, byte_checks, message_checks, life_checks) for check in part.CHECKS
}
DEFAULT_CONFIG = AgentConfig(
    copy_threads=2, transfer_timeout=15.0, connect_timeout=8.0, request_timeout=8.0, deregister_timeout=3.0
)


class Outcome(enum.Enum):
    """How a check went."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """How one check went at one place, and why if it did not pass."""

    check: str
    place: Place
    outcome: Outcome
    seconds: float
    reason: str = ""
    error: BaseException | None = None

    def __str__(self) -> str:
        tail = f": {self.reason}" if self.reason else ""
        return f"{self.outcome.value} {self.check} {self.place.value} ({self.seconds:.2f} s){tail}"


@dataclass(frozen=True, slots=True)
class Report:
    """How every check went."""

    backend: str
    results: Sequence[Result]

    @property
    def failures(self) -> list[Result]:
        """The checks that failed."""
        return [result for result in self.results if result.outcome is Outcome.FAILED]

    def __str__(self) -> str:
        counts = ", ".join(
            f"{sum(result.outcome is outcome for result in self.results)} {outcome.value.lower()}"
            for outcome in Outcome
        )
        run = [f"  {result}" for result in self.results if result.outcome is not Outcome.SKIPPED]
        skipped = Counter(
            f"{result.place.value}: {result.reason}" for result in self.results if result.outcome is Outcome.SKIPPED
        )
        skips = [f"  skipped {count} {where}" for where, count in skipped.items()]
        return "\n".join([f"backend {self.backend}: {counts}", *run, *skips])


class ConformanceError(RaynixlError, AssertionError):
    """A backend breaks its contract. Next: mend the backend; `report` holds every result."""

    remedy = "mend the backend; raynixl.backends.base says what it owes"
    report: Report


@dataclass(frozen=True, slots=True)
class Check:
    """One check at one place; call it with the backend's factory."""

    name: str
    place: Place

    def __str__(self) -> str:
        return f"{self.name}-{self.place.name.lower()}"

    def __call__(self, factory: Factory, *, config: AgentConfig = DEFAULT_CONFIG) -> Result:
        """Run the check; return its result, which may say that it was skipped.

        Raises:
            ConformanceError: the backend fails it.
        """
        far = far_side(self.place, factory, config)
        try:
            result = _run(self, far, factory, config)
        finally:
            far.close()
        _raise_failures(Report(_name_of(factory), [result]))
        return result


def backend_checks(*, places: Sequence[Place] = tuple(Place)) -> list[Check]:
    """Return every check, for test frameworks: `parametrize("check", backend_checks(), ids=str)`."""
    return [Check(name, place) for place in places for name in _CHECKS]


def check_backend(
    factory: Factory, *, places: Sequence[Place] = tuple(Place), config: AgentConfig = DEFAULT_CONFIG
) -> Report:
    """Run every check on the backends that a factory makes; return how each went.

    Host memory is what the checks move. A place that the backend does not reach is skipped with the backend's own
    reason; at least one must be reached. For other processes the factory must be importable there.

    Raises:
        ConformanceError: some check failed; the message lists all that did, and `report` has every result.
    """
    results: list[Result] = []
    for place in places:
        far = far_side(place, factory, config)
        try:
            results += [_run(check, far, factory, config) for check in backend_checks(places=(place,))]
        finally:
            far.close()
    report = Report(_name_of(factory), results)
    if all(result.outcome is Outcome.SKIPPED for result in results):
        reasons = sorted({result.reason for result in results})
        raise _error(f"nothing of backend {report.backend} could be checked: {'; '.join(reasons)}", report)
    _raise_failures(report)
    return report


def _run(check: Check, far: Far, factory: Factory, config: AgentConfig) -> Result:
    began = time.monotonic()
    outcome, reason, error = Outcome.PASSED, "", None
    try:
        with Scene(factory, config, far) as scene:
            _CHECKS[check.name](scene)
    except Unreached as exc:
        outcome, reason = Outcome.SKIPPED, str(exc)
    except Exception as exc:  # noqa: BLE001 - handed to the caller in the report
        outcome, reason, error = Outcome.FAILED, str(exc) or repr(exc), exc
        if not isinstance(exc, AssertionError | RaynixlError):
            reason = repr(exc)
    if outcome is Outcome.FAILED:
        far.vanish()  # whatever state the failure left behind is no burden to the next check
    return Result(check.name, check.place, outcome, time.monotonic() - began, reason, error)


def _raise_failures(report: Report) -> None:
    failures = report.failures
    if failures:
        lines = "".join(f"\n  {result}" for result in failures)
        raise _error(
            f"backend {report.backend} fails {len(failures)} of {len(report.results)} checks:{lines}\n", report
        ) from failures[0].error


def _error(message: str, report: Report) -> ConformanceError:
    error = ConformanceError(message)
    error.report = report
    return error


def _name_of(factory: Factory) -> str:
    return str(getattr(factory, "name", None) or getattr(factory, "__name__", factory))

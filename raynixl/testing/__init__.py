"""The conformance suite that every backend passes: ours, and those of third parties.

In one call, which raises one error that lists every failure:

    report = raynixl.testing.check_backend(MyBackend)
    print(report)

Or one test for each check:

    @pytest.mark.parametrize("check", raynixl.testing.backend_checks(), ids=str)
    def test_my_backend(check):
        check(MyBackend)
"""

from raynixl.testing.conformance import Check, ConformanceError, Outcome, Report, Result, backend_checks, check_backend
from raynixl.testing.places import Place

__all__ = [
    "Check", "ConformanceError", "Outcome", "Place", "Report", "Result", "backend_checks", "check_backend",
]  # fmt: skip

"""`python -m foundation [--json]`: every hand-derived gradient against autodiff and finite differences.

Prints a row per check and exits 1 where one fails. `--json` ends with one JSON object on the last line.
"""

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import jax

from foundation.checks import all_checks
from foundation.parity import AUTODIFF_TOLERANCE, FINITE_DIFFERENCE_TOLERANCE, Outcome, run


def main(argv: list[str] | None = None) -> int:
    """Runs all checks, prints the table, returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foundation", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    print(f"{'operation: input':<47} {'autodiff':>9} {'differences':>12}")
    outcomes = []
    # Compiling takes most of the time, and does not hold Python's lock.
    with ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(run, all_checks()):
            print(row(outcome), flush=True)
            outcomes.append(outcome)
    summary = summarise(outcomes)
    print(
        f"\n{summary['checks']} checks, {len(summary['failed'])} failed; largest relative error\n"
        f"  {summary['max_rel_error_autodiff']:.1e} against autodiff (allowed {AUTODIFF_TOLERANCE:.0e})\n"
        f"  {summary['max_rel_error_finite_difference']:.1e} against finite differences "
        f"(allowed {FINITE_DIFFERENCE_TOLERANCE:.0e})"
    )
    if arguments.json:
        print(json.dumps({k: _or_null(v) for k, v in summary.items()}, allow_nan=False))
    return 1 if summary["failed"] else 0


def _or_null(value: object) -> object:
    """The value, or None for a number that is not finite: JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row(outcome: Outcome) -> str:
    """One line of the table."""
    finite = "at a tie" if outcome.finite_difference is None else f"{outcome.finite_difference:.1e}"
    verdict = "ok" if outcome.passed else "FAILED"
    return f"{f'{outcome.operation}: {outcome.case}':<47} {outcome.autodiff:>9.1e} {finite:>12}  {verdict}"


def summarise(outcomes: list[Outcome]) -> dict:
    """What `--json` prints. A NaN is reported as infinity would be: JSON has neither, so as null."""
    finite = [o.finite_difference for o in outcomes if o.finite_difference is not None]
    return {
        "checks": len(outcomes),
        "failed": [f"{o.operation}/{o.case}" for o in outcomes if not o.passed],
        "max_rel_error_autodiff": _largest([o.autodiff for o in outcomes]),
        "max_rel_error_finite_difference": _largest(finite),
    }


def _largest(errors: list[float]) -> float:
    return max(errors, key=lambda e: float("inf") if e != e else e)


if __name__ == "__main__":
    sys.exit(main())

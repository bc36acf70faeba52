"""What the battery measured: tests record figures as properties, and the end of a session adds them up.

`MOE_JAX_RECORD=FOLDER` also writes them into a dated file there.
"""

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

type Record = Callable[[str, object], None]
"""pytest's `record_property`: figures of one name are added up over the tests."""

_PREFIX = "figure: "


def figure(record: Record, name: str, count: float) -> None:
    """Add to a figure of the battery, such as "kills" or "runs lost"; a measure has a name of its own."""
    record(_PREFIX + name, count)


def collect(reports: list[Any]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", []) if report.when == "call" else []:
            if name.startswith(_PREFIX):
                totals[name.removeprefix(_PREFIX)] = totals.get(name.removeprefix(_PREFIX), 0) + value
    return totals


def summarize(terminalreporter: Any) -> None:
    """Print the figures of a session, if it had any."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    totals = collect(reports)
    if not totals:
        return
    terminalreporter.section("reliability")
    for name, value in totals.items():
        terminalreporter.write_line(f"{value:8,}  {name}")
    folder = os.environ.get("MOE_JAX_RECORD")
    if folder:
        from moe_jax.system import machine

        today = datetime.date.today().isoformat()
        failed = sum(len(terminalreporter.stats.get(kind, [])) for kind in ("failed", "error"))
        document = {"date": today, "machine": machine.describe(), "failed": failed}
        document |= {"command": "pytest -m " + repr(terminalreporter.config.option.markexpr), "figures": totals}
        form = "long" if any("slow" in report.keywords for report in reports) else "short"
        path = Path(folder) / f"{today}-reliability-{form}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

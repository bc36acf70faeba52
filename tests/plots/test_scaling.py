"""The picture of a scaling table: each bar is a number of the table."""

from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
from moe_jax.plots.scaling import scaling_figure


def row(devices: int, **changes: Any) -> dict[str, Any]:
    known = {
        "devices": devices,
        "arguments_mib": 1024.0 * devices,
        "temporary_mib": 512.0,
        "total_mib": 1024.0 * devices + 512,
        "memory_mib": 4096.0,
        "sent_bytes": {"all-to-all": 3 * 2**20, "all-gather": 0, "all-reduce": 5 * 2**20},
        "arithmetic_ms": 7.0,
        "collectives_ms": 2.0,
        "predicted_step_ms": 9.0,
        "efficiency": 0.5,
    }
    return known | changes


REFUSED: dict[str, Any] = dict.fromkeys(
    ["sent_bytes", "arithmetic_ms", "collectives_ms", "predicted_step_ms", "efficiency"]
)


def bars(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """(bottom, height) of the bars of each label."""
    found = {}
    for container in axes.containers:
        found[container.get_label()] = [(patch.get_y(), patch.get_height()) for patch in container.patches]
    return found


def test_the_bars_are_the_numbers_of_the_table() -> None:
    memory, sent, time = scaling_figure([row(1), row(2, **REFUSED)], "x").axes
    assert bars(memory) == {"arguments": [(0, 1), (0, 2)], "temporary": [(1, 0.5), (2, 0.5)]}
    assert bars(sent) == {"all-to-all": [(0, 3), (0, 0)], "all-reduce": [(3, 5), (0, 0)]}
    assert bars(time) == {"arithmetic": [(0, 7), (0, 0)], "collectives": [(7, 2), (0, 0)]}
    assert [text.get_text() for text in time.texts] == ["50%"]
    tops = [axes.get_ylim()[1] for axes in (memory, sent, time)]
    assert tops == pytest.approx([1.3 * 4, 1.3 * 8, 1.3 * 9])
    assert [line.get_ydata()[0] for line in memory.lines] == [4]

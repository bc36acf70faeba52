"""BenchmarkRequest: what a suite of `benchmark.py` is asked for; and the tables that suites print."""

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from moe_jax.config import RunConfig
from moe_jax.system.environment import usable_cores
from moe_jax.system.machine import Measured, Times, alternate, processor, versions


def describe_machine() -> dict[str, Any]:
    """Machine, package versions and commit, to be saved with a measurement."""
    device = jax.devices()[0]
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": usable_cores(),
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


class BenchmarkRequest(NamedTuple):
    """What to measure, and how often."""

    config: RunConfig
    """The configuration to measure. Its vocabulary size must not be 0."""
    batch_size: int
    """Sequences of a training step."""
    rounds: int
    """How often each candidate runs."""


def after_rest(run: Callable[[], Any], rest: float, turn: float) -> Callable[[], Measured]:
    """A candidate of `machine.alternate` whose rivals run in other processes.

    Before each run there are `rest` seconds, in which the threads of the other process go to sleep. The candidate then
    runs again and again for `turn` seconds, and the median time counts: a processor that has slept is slow at first.
    """

    def median() -> Measured:
        time.sleep(rest)
        taken: list[float] = []
        end = time.perf_counter() + turn
        while not taken or time.perf_counter() < end:
            taken += alternate({"": run}, 1, warmups=0)[""].seconds
        return Measured(np.median(taken))

    return median


def matmul_rate_in(times: dict[str, Times], products: Mapping[str, tuple[Callable[[], Any], float]]) -> float:
    """Operations a second of the fastest of the matrix products (`machine.matmuls`) that ran in turn with others."""
    return max(flops / times[name].median for name, (_, flops) in products.items())


def times_table(title: str, times: dict[str, Times], extra: Callable[[str, Times], str] | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("what ran")
    for name in ("median ms", "spread", *([""] if extra else [])):
        table.add_column(name, justify="right")
    for name, t in times.items():
        cells = [f"{t.median * 1e3:,.2f}", f"{t.spread:.0%}", *([extra(name, t)] if extra else [])]
        table.add_row(name, *cells)
    return table


WORDS = {
    "wall_over_dense_active": "x the time of a plain dense one with as many active parameters",
    "wall_over_best_dense": "x the time of the fastest dense layout",
    "dropless_wall_over_best_dense": "x the time of the fastest dense layout, if nothing is dropped",
    "dense_all_over_wall": "x as fast as all experts on all tokens",
    "dense_total_over_wall": "x as fast as a dense one with as many parameters in all",
    "layer_share_of_matmul_peak": "of the speed of the fastest matrix product",
    "share_of_matmul_peak": "of the speed of the fastest matrix product",
    "matmul_flops_per_second": "GFLOP/s in the fastest matrix product",
    "decode_share_of_bandwidth_bound": "of the speed at which memory can deliver the weights of each token",
    "memory_bytes_per_second": "GB/s read from memory",
    "late_first_token_over_prefill_and_step": "x the time of prefill and one step, until a late text begins",
    "16_texts_over_one": "x as many tokens a second as one text",
    "16_texts_over_one_of_the_same_server": "x as many tokens a second as one text in the same server",
    "train_ratio_float32": "x as fast as Mixtral: training step, both in float32",
    "train_ratio_bfloat16": "x as fast as Mixtral: training step, both in bfloat16",
    "train_ratio_best": "x as fast as Mixtral: training step, each in its faster precision",
    "forward_ratio": "x as fast as Mixtral: forward pass, in float32",
    "prefill_ratio_float32": "x as fast as Mixtral: prefill, both in float32",
    "prefill_ratio_bfloat16": "x as fast as Mixtral: prefill, both in bfloat16",
    "prefill_ratio_best": "x as fast as Mixtral: prefill, each in its faster precision",
    "decode_ratio": "x as fast as Mixtral: decoding, in float32",
}
"""What `print_numbers` says after a value. Other names are printed as they are, with spaces."""


def print_numbers(console: Console, numbers: dict[str, Any]) -> None:
    """Print a line for each number: the value, then what it is."""
    table = Table.grid(padding=(0, 1))
    for name, value in numbers.items():
        value *= 1e-9 if name.endswith(("flops_per_second", "bytes_per_second")) else 1
        shown = f"{value:.0%}" if "share_of" in name else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        table.add_row(shown.rjust(7), WORDS.get(name, name.replace("_", " ")))
    console.print(table, "")

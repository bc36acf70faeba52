"""Which of two precisions does this machine multiply faster? Measured once, and kept for later processes."""

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax

from moe_jax.system.files import cache_dir, write_atomically
from moe_jax.system.json_text import json_text
from moe_jax.system.limits import usable_cores
from moe_jax.system.machine import matmuls, processor
from moe_jax.system.timing import Measured, alternate

SIZE, LARGE_SIZE = 1024, 4096
"""Rows and columns of the matrices, on a CPU and elsewhere. On a card a launch must not count."""
ROUNDS = 11


@cache
def gain(narrow: str, device: Any, units: str = "") -> float:
    """How many times as fast a `jax.Device` of this machine multiplies matrices of the dtype `narrow` as of float32.

    The medians of ROUNDS turns count. The result is kept in the cache folder. It is measured again for another device,
    other matrix `units` of a processor, another number of cores or another jaxlib.
    """
    name = f"{processor()}, {units}" if device.platform == "cpu" else device.device_kind
    key = f"{narrow} on {name}, {usable_cores()} cores, jaxlib {importlib.metadata.version('jaxlib')}"
    path = cache_dir() / "races.json"
    kept: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = found if isinstance(found, dict) else {}
    if type(kept.get(key)) is float and kept[key] > 0:
        return kept[key]
    measured = _measured(narrow, device)
    with contextlib.suppress(OSError):  # a cache that cannot be written: the next process measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(kept | {key: measured}), durable=False)
    return measured


def _measured(narrow: str, device: Any) -> float:
    on_cpu = device.platform == "cpu"
    size = SIZE if on_cpu else LARGE_SIZE
    with jax.default_device(device):
        runs = {dtype: matmuls(dtype, (size,))[f"matmul {size}"][0] for dtype in ("float32", narrow)}
        if on_cpu:
            runs = {dtype: partial(_processor_time, run) for dtype, run in runs.items()}
        times = alternate(runs, ROUNDS)
    return times["float32"].median / times[narrow].median


def _processor_time(run: Callable[[], Any]) -> Measured:
    """Seconds of all cores for one call. Other programs on the same cores hardly change them: beside four programs on
    two cores, the clock once gave a ratio of 1.02, and this time 1.90 as on a quiet machine."""
    begin = time.process_time()
    jax.block_until_ready(run())
    return Measured(time.process_time() - begin)

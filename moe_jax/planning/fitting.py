"""`train.py` on the device that it has: the first rung of the ladder (`ladder.py`) whose programs fit its memory.

config.json holds the chosen settings, and under "fitted" the device, the memory, and what was asked for. A resumed run
keeps its settings on the same device. On another one the ladder is walked again, from what was asked for.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.model.costs import least_step_bytes
from moe_jax.planning.device_memory import Memory
from moe_jax.planning.ladder import Room, fitting_preset, rungs, walk
from moe_jax.planning.plans import Plan, chosen, named
from moe_jax.planning.target import MARGIN
from moe_jax.system.environment import MIB
from moe_jax.training.session import Fitted

MAY_CHANGE = [("train", "batch_size"), ("train", "grad_accum"), ("execution", "remat")]
"""The settings that the ladder chooses at a resume too. The state of a run belongs to one optimizer."""
FIT = ("execution", "fit")


def room_here(config: RunConfig, kept_precision: str = "") -> Room | None:
    """The first device of this machine, with the memory of --memory or what the device says is free. None if neither is
    known, as on a CPU."""
    device, stats = jax.devices()[0], jax.devices()[0].memory_stats() or {}
    if config.execution.memory:
        return Room(device, config.execution.memory_bytes / MIB, compiled_here, kept_precision)
    if "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return Room(device, MARGIN * free / MIB, compiled_here, kept_precision)


def compiled_here(program: Any, *arguments: Any) -> float:
    """MiB of a jitted program on this machine. The compilation cache keeps it for the run."""
    return Memory.of(program.lower(*arguments).compile()).total


def fit(
    config: RunConfig,
    kept_precision: str = "",
    saved: RunConfig | None = None,
    record: Any = None,
    failed: RunConfig | None = None,
) -> Fitted:
    """The settings with which a run fits this device.

    `saved` are the settings of the run that is resumed, and `record` is what its config.json has under "fitted".
    `failed` is the setting whose first step ran out of memory: the choice is below it, whatever the device says.

    Raises UserError if no rung fits.
    """
    device, execution = jax.devices()[0], config.execution
    if not execution.fitted:
        return Fitted(config, record)
    here = {"device": device.device_kind, "memory": execution.memory}
    asked = config if saved is None else config.override({FIT: "auto"})
    if saved is not None and isinstance(record, dict) and _values(config) in (_values(saved), record.get("asked")):
        if failed is None and here.items() <= record.items():
            return Fitted(_with(config, _values(saved)), record)
        asked = _with(asked, record.get("asked"))
    room = room_here(asked, kept_precision)
    if room is None and failed is None:
        return Fitted(asked.override({FIT: execution.fit}))
    room = room or Room(device, math.inf, lambda *_: 0.0, kept_precision)
    plans = list(walk(asked, room, failed))
    if not plans or not plans[-1].fits(room.budget):
        raise _nothing_fits(asked, plans, room, failed, resumed=saved is not None)
    best = plans[-1]
    record = here | {"asked": _values(asked)}
    if room.budget < math.inf:
        record |= {"total_mib": round(best.total, 1), "budget_mib": round(room.budget, 1)}
    return Fitted(best.config.override({FIT: execution.fit}), record, _reason(plans, room, failed))


def _values(config: RunConfig) -> dict[str, Any]:
    return {f"{section}.{name}": getattr(config.section(section), name) for section, name in MAY_CHANGE}


def _with(config: RunConfig, values: Any) -> RunConfig:
    """The configuration with other values (`_values`); as it is if they are damaged."""
    now = _values(config)
    if not isinstance(values, dict) or {n: type(v) for n, v in values.items()} != {n: type(v) for n, v in now.items()}:
        return config
    try:
        return config.override({key: values[".".join(key)] for key in MAY_CHANGE})
    except ConfigError:
        return config


def _reason(plans: Sequence[Plan], room: Room, failed: RunConfig | None) -> str:
    """One line: the choice, and why the rung above was not taken."""
    best, above = plans[-1], plans[-2:-1]
    line = f"fitted: {named(best.config)}"
    if room.budget < math.inf:
        line += f": {best.total:,.0f} of {room.budget:,.0f} MiB"
    if above:
        least = "" if above[0].programs else "at least "
        line += f"; {named(above[0].config)} needs {least}{above[0].total:,.0f} MiB"
    elif failed is not None:
        line += f"; with {named(failed)} the first step ran out of memory"
    return line


def _nothing_fits(
    config: RunConfig, plans: Sequence[Plan], room: Room, failed: RunConfig | None, resumed: bool
) -> UserError:
    if not plans:
        assert failed is not None
        problem = f"the first step ran out of memory with {named(failed)}, and no other setting is left"
    else:
        smallest = chosen(plans, room.budget)
        least, programs = "" if smallest.programs else "at least ", smallest.programs or {"step": smallest.least}
        problem = f"no setting fits {room.budget:,.0f} MiB: the smallest, {named(smallest.config)}, needs {least}"
        problem += f"{smallest.total:,.0f} for its {max(programs, key=programs.__getitem__)}"
    if resumed:  # model and optimizer stay
        return UserError(f"{problem}; free memory of the device, or use another one")
    lean = rungs(config.override({FIT: "any"}))
    hope = config.execution.fit == "auto" and min(map(least_step_bytes, lean)) <= room.budget * MIB
    ways = ["--fit any, which may take a leaner optimizer"] if hope else []
    fits = fitting_preset(config, room) if room.budget < math.inf else ""
    ways += [f"--preset {fits}, which fits"] if fits else ["a smaller --seq-len"]
    return UserError(f"{problem}; use {', or '.join(ways)}")

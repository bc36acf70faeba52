"""The settings with which a run fits its device: a ladder of them, from the fastest on, and the choice of `train.py`.

Every setting takes the steps that were asked for: as many sequences each, and the same gradient up to rounding. The
earlier of two settings computes less: it has the larger micro-batch or, of the same, no remat. A leaner optimizer
trains differently. Those settings come last, and only with `--fit any`. The programs of each are compiled, and XLA's
plan of their buffers is compared with the memory of the device, until one fits.

config.json holds the chosen settings, and under "fitted" the device, the memory, and what was asked for. A resumed run
keeps its settings on the same device. On another one the ladder is walked again, from what was asked for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import OptimizerKind, RunConfig, TrainConfig, UserError
from moe_jax.data.batches import evaluation_windows
from moe_jax.inference.decode import NOTHING_GIVEN
from moe_jax.inference.sampling import Sampling
from moe_jax.model.costs import least_step_bytes
from moe_jax.model.precision import choose_policy
from moe_jax.system.environment import MIB
from moe_jax.system.errors import is_out_of_memory
from moe_jax.system.files import read_json
from moe_jax.system.terminal import say, working
from moe_jax.training.evaluate import evaluation_rows
from moe_jax.training.plan import MARGIN, Plan, chosen, compiling_file, named_in_the_folder, values_of, with_values
from moe_jax.training.programs import Programs

OPTIMIZERS_BY_STATE: tuple[OptimizerKind, ...] = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
"""Optimizers in descending order of state."""
BATCH, ACCUMULATION, REMAT = ("train", "batch_size"), ("train", "grad_accum"), ("execution", "remat")
MAY_CHANGE = [BATCH, ACCUMULATION, REMAT]
"""The settings that the ladder chooses at a resume too. The state of a run belongs to one optimizer."""
FIT = ("execution", "fit")


class Fitted(NamedTuple):
    """The settings of a run, which fit its device."""

    config: RunConfig
    record: Any = None
    """For config.json: the device, the memory, and what was asked for. None if all is as it was asked for."""
    note: str = ""
    """What was chosen, and why. Empty if nothing was."""


# The ladder


class Device(NamedTuple):
    """A device that the programs of a run must fit."""

    device: Any
    """A `jax.Device` of this machine, or what describes a card (`precision.Card.of` takes both)."""
    budget: float
    """MiB for a program, with what is in memory beside it."""
    measure: Callable[..., float]
    """(jitted program, *arguments or their shapes) -> MiB of the program, compiled for the device."""
    kept_precision: str = ""
    """The precision of a resumed run (`choose_policy`)."""
    compiling: Callable[[RunConfig], AbstractContextManager[None]] = lambda _: nullcontext()
    """What surrounds the compilation of a setting."""


def program_mib(compiled: Any) -> float:
    """MiB of device memory of a compiled program, by XLA's plan of its buffers. Outputs that reuse the memory of a
    donated argument do not count. Of a program for a mesh: the memory of one device."""
    m = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    return (m.argument_size_in_bytes + outputs + m.temp_size_in_bytes) / MIB


def settings_to_try(config: RunConfig) -> list[RunConfig]:
    """The settings that may be tried, from the fastest on. Each has the sequences a step of `config`."""
    micro = config.train.batch_size * config.train.grad_accum
    sizes = [micro]
    while micro > 1:
        micro = next(size for size in range(micro // 2, 0, -1) if sizes[0] % size == 0)
        sizes.append(micro)
    remats = (True,) if config.execution.remat else (False, True)
    lean = leaner(config.train) if config.execution.fit == "any" else [{}]
    return [
        config.override({**saving, BATCH: size, ACCUMULATION: sizes[0] // size, REMAT: remat})
        for saving in lean
        for size in sizes
        for remat in remats
    ]


def leaner(train: TrainConfig) -> list[dict[tuple[str, str], str]]:
    """Changes with ever less memory for weights and optimizer state, beginning with none. With adapters, whose state is
    small, the frozen weights in bfloat16."""
    if train.lora_rank:
        return [{("train", "param_dtype"): dtype} for dtype in dict.fromkeys((train.param_dtype, "bfloat16"))]
    known = train.optimizer in OPTIMIZERS_BY_STATE
    kinds = OPTIMIZERS_BY_STATE[OPTIMIZERS_BY_STATE.index(train.optimizer) :] if known else OPTIMIZERS_BY_STATE
    return [{("train", "optimizer"): kind} for kind in dict.fromkeys((train.optimizer, *kinds))]


def settings_after(config: RunConfig, failed: RunConfig) -> list[RunConfig]:
    """The settings of `config` that need less than the setting `failed`."""
    tried = settings_to_try(config)
    kinds = [_optimizer(c) for c in tried]

    def depth(c: RunConfig) -> tuple[int, int, bool]:
        return kinds.index(_optimizer(c)), -c.train.batch_size, c.execution.remat

    return [setting for setting in tried if depth(setting) > depth(failed)]


def _optimizer(config: RunConfig) -> tuple[str, str]:
    return config.train.optimizer, config.train.param_dtype


def plans_until_one_fits(config: RunConfig, device: Device, failed: RunConfig | None = None) -> Iterator[Plan]:
    """The plans of the settings in order, to the first that fits. With `failed`, of those after that setting."""
    tried = settings_to_try(config) if failed is None else settings_after(config, failed)
    between: dict[tuple[str, str], dict[str, float]] = {}
    for number, setting in enumerate(tried, 1):
        known = between.get(_optimizer(setting), {})
        if max(known.values(), default=0.0) > device.budget:
            continue  # what runs between the steps depends on the optimizer only, and does not fit
        plan = plan_step(setting, device, f": setting {number} of at most {len(tried)}, a minute or more")
        if plan.programs and plan.total <= device.budget:
            known = between[_optimizer(setting)] = known or plan_between(setting, device)
            plan = plan._replace(programs=plan.programs | known)
        yield plan
        if plan.fits(device.budget):
            return


def plan_step(config: RunConfig, device: Device, which: str = "") -> Plan:
    """Compile the training step of a configuration for the device, unless it cannot fit."""
    precision = choose_policy(config.execution.compute_dtype, device.device, device.kept_precision).compute
    least = least_step_bytes(config.override({("execution", "compute_dtype"): precision})) / MIB
    plan = Plan(values_of(config), precision, least, {})
    if least > device.budget:
        return plan
    with working(f"compiling the training step, {plan.name}{which}"), device.compiling(config):
        programs = Programs.of(config, device.device, kept_precision=device.kept_precision)
        batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
        memory = device.measure(programs.step, programs.state_shapes, batch)
    return plan._replace(programs={"step": memory}, attention=programs.attention.reason)


def plan_between(config: RunConfig, device: Device) -> dict[str, float]:
    """MiB of the programs that run between training steps, including what stays in memory: the optimizer state and,
    while it works on the merged weights, the weights with their adapters.

    Prefill is not among them: it computes one row of what evaluation computes for several.
    """
    programs = Programs.of(config, device.device, kept_precision=device.kept_precision)
    params, seq_len = programs.param_shapes, config.model.seq_len
    state_shapes = programs.state_shapes
    beside = [state_shapes.optimizer]
    if state_shapes.adapters is not None:
        beside += [state_shapes.params, state_shapes.adapters]
    waiting = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(beside)) / MIB
    e = next(evaluation_windows(np.zeros(2, np.int32), seq_len=seq_len, batch_size=evaluation_rows(seq_len)))
    decoder = programs.decoder()
    length = jax.ShapeDtypeStruct((), jnp.int32)
    seen, key = jax.eval_shape(lambda: (np.zeros(config.model.vocab_size, bool), jax.random.key(0)))
    text = jax.eval_shape(decoder.begin_empty, params, seen, Sampling().in_own_types(), key)
    jobs: dict[str, tuple[Any, ...]] = {
        "evaluation": (programs.evaluation, params, e.inputs, e.targets, e.start, e.weights),
        "decoding": (decoder.write, params, text, NOTHING_GIVEN, length, length),
    }
    with working("compiling evaluation and decoding, faster than a step"):
        return {name: device.measure(*job) + waiting for name, job in jobs.items()}


# The choice on this machine


def device_here(config: RunConfig, kept_precision: str = "") -> Device | None:
    """The first device of this machine, with the memory of --memory or what the device says is free. None if neither is
    known, as on a CPU."""
    device, stats = jax.devices()[0], jax.devices()[0].memory_stats() or {}
    if config.execution.memory:
        return Device(device, config.execution.memory_bytes / MIB, compiled_here, kept_precision)
    if "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return Device(device, MARGIN * free / MIB, compiled_here, kept_precision)


def compiled_here(program: Any, *arguments: Any) -> float:
    """MiB of a jitted program on this machine. The compilation cache keeps it for the run. Infinite if it cannot be
    compiled: a compiler for cards tries out kernels, which takes memory, and it fails on some programs."""
    try:
        return program_mib(program.lower(*arguments).compile())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error) and "INTERNAL" not in str(error):
            raise
        return math.inf


def left_by_a_crash(config: RunConfig) -> RunConfig | None:
    """The setting whose compilation ended the last process of this run, if there are others to take in its place."""
    path = compiling_file(config)
    try:
        crashed = with_values(config, read_json(path))
        path.unlink()
    except (FileNotFoundError, ValueError):
        return None
    if crashed not in settings_to_try(config) or not settings_after(config, crashed):
        return None
    say(f"the last start ended while it compiled {_named(crashed)}; trying the next setting")
    return crashed


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

    Raises UserError if no setting fits.
    """
    execution = config.execution
    if not execution.fitted:
        return Fitted(config, record)
    here = _here(config)
    asked = config if saved is None else config.override({FIT: "auto"})
    if saved is not None and record:
        kept = values_of(saved, MAY_CHANGE)
        if values_of(config, MAY_CHANGE) in (kept, record["asked"]):  # nothing else is asked for now
            asked = with_values(asked, record["asked"])
            if failed is None and here.items() <= record.items():
                lacked = with_values(asked, record["failed"]) if "failed" in record else None
                if lacked is None or not settings_after(asked, lacked):
                    return Fitted(with_values(config, kept), record)
                failed = lacked
    device = device_here(asked, kept_precision)
    if device is None and failed is None:
        return Fitted(asked.override({FIT: execution.fit}))
    device = device or Device(jax.devices()[0], math.inf, lambda *_: 0.0, kept_precision)
    device = device._replace(compiling=named_in_the_folder)
    plans = list(plans_until_one_fits(asked, device, failed or left_by_a_crash(asked)))
    if not plans or not plans[-1].fits(device.budget):
        raise _nothing_fits(asked, plans, device, failed, resumed=saved is not None)
    best = plans[-1]
    record = here | {"asked": values_of(asked, MAY_CHANGE)}
    if device.budget < math.inf:
        record |= {"total_mib": round(best.total, 1), "budget_mib": round(device.budget, 1)}
    return Fitted(
        with_values(asked, best.setting).override({FIT: execution.fit}), record, _reason(plans, device, failed)
    )


def with_failure(config: RunConfig, record: Any) -> Any:
    """`Fitted.record` of a run whose device lacked memory for its settings. A resume there takes the next ones."""
    setting = values_of(config, MAY_CHANGE)
    return (record or _here(config) | {"asked": setting}) | {"failed": setting}


def _here(config: RunConfig) -> dict[str, Any]:
    return {"device": jax.devices()[0].device_kind, "memory": config.execution.memory}


def _reason(plans: list[Plan], device: Device, failed: RunConfig | None) -> str:
    """One line: the choice, and why the setting before it was not taken."""
    best, before = plans[-1], plans[-2:-1]
    line = f"fitted: {best.name}"
    if device.budget < math.inf:
        line += f": {best.total:,.0f} of {device.budget:,.0f} MiB"
    if before:
        least = "" if before[0].programs else "at least "
        line += f"; {before[0].name} needs {least}{_amount(before[0].total, ' MiB')}"
    elif failed is not None:
        line += f"; with {_named(failed)} it ran out of memory"
    return line


def _nothing_fits(
    config: RunConfig, plans: list[Plan], device: Device, failed: RunConfig | None, resumed: bool
) -> UserError:
    if not plans:
        assert failed is not None
        problem = f"the first step ran out of memory with {_named(failed)}, and no other setting is left"
    else:
        smallest = chosen(plans, device.budget)
        least, programs = "" if smallest.programs else "at least ", smallest.programs or {"step": smallest.least}
        problem = f"no setting fits {device.budget:,.0f} MiB: the smallest, {smallest.name}, needs {least}"
        problem += f"{_amount(smallest.total)} for its {max(programs, key=programs.__getitem__)}"
    if resumed:  # model and optimizer stay
        return UserError(f"{problem}; free memory of the device, or use another one")
    lean = settings_to_try(config.override({FIT: "any"}))
    hope = config.execution.fit == "auto" and min(map(least_step_bytes, lean)) <= device.budget * MIB
    leaner = "--fit any, which may take a leaner optimizer, " if hope else ""
    return UserError(f"{problem}; use {leaner}a smaller --seq-len or another --preset")


def _amount(mib: float, unit: str = "") -> str:
    return f"{mib:,.0f}{unit}" if mib < math.inf else "more to compile"


def _named(config: RunConfig) -> str:
    return Plan(values_of(config), "", 0, {}).name

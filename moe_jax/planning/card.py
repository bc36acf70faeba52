"""A card in this machine: what JAX needs before it can use the card, and what the card reaches (`doctor --gpu`).

Nothing is imported at the top that imports jax: what is missing is said first.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from moe_jax.config import PresetName
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.planning.plans import known_cards, recorded
from moe_jax.system.environment import MIB, ask_nvidia_smi
from moe_jax.training.plan import MARGIN

OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}
"""Extra -> the major version of the oldest driver that its CUDA accepts."""
LEAST_CAPABILITY = 7.5
"""cuDNN 9 has kernels for Turing and newer cards."""
LEAST_FREE_MIB = 1024
"""CUDA and its kernels take some 400; what is left must hold a small model."""
AGAIN = "start with `uv run --extra cuda12 moe-jax doctor --gpu`"


class Finding(NamedTuple):
    """One line about this machine or its card."""

    what: str
    detail: str
    """What is there, or what is missing and how to get it."""
    good: bool = True


def needs() -> Iterator[Finding]:
    """What JAX needs of this machine, in the order in which it is put right."""
    system = f"{platform.system()} {platform.release()}"
    if sys.platform == "linux":
        yield Finding("system", system)
    else:
        yield Finding("system", f"{system}: JAX uses NVIDIA cards on Linux only; on Windows, install WSL 2", good=False)
    answer = ask_nvidia_smi("name", "driver_version")
    extra = _extra()
    oldest = OLDEST_DRIVER[extra or "cuda12"]
    if answer is None:
        how = f"install NVIDIA's driver {oldest} or newer, and restart; for WSL 2 install it in Windows"
        yield Finding("driver", f"`nvidia-smi` does not answer: {how}", good=False)
    elif _major(answer[1]) < oldest:
        how = f"{extra or 'cuda12'} needs {oldest} or newer: update it{', or use cuda12' if extra == 'cuda13' else ''}"
        yield Finding("driver", f"{answer[1]} for {answer[0]}: {how}", good=False)
    else:
        yield Finding("driver", f"{answer[1]} for {answer[0]}")
    with suppress(ValueError):  # older drivers do not say it
        capability, free = map(float, ask_nvidia_smi("compute_cap", "memory.free") or [])
        if capability < LEAST_CAPABILITY:
            how = f"cuDNN needs {LEAST_CAPABILITY} (Turing) or newer; train on the CPU, with JAX_PLATFORMS=cpu"
            yield Finding("capability", f"the card has {capability}: {how}", good=False)
        if free < LEAST_FREE_MIB:
            how = f"{free:,.0f} MiB are free, and a small model needs {LEAST_FREE_MIB:,}: close what else uses the card"
            yield Finding("free memory", how, good=False)
    if not extra:
        yield Finding("CUDA", f"JAX's CUDA plugin is not installed: {AGAIN}", good=False)
    elif not _version(f"nvidia-cudnn-cu{extra[-2:]}"):
        yield Finding("CUDA", f"JAX's CUDA plugin is here, but CUDA's libraries are not: {AGAIN}", good=False)
    else:
        yield Finding("CUDA", f"extra {extra}, plugin {_version(f'jax-{extra}-plugin')}")
    if (chosen := os.environ.get("JAX_PLATFORMS", "")) and not {"cuda", "gpu"} & set(chosen.split(",")):
        yield Finding("JAX_PLATFORMS", f"JAX_PLATFORMS={chosen} hides the card: unset it", good=False)


def _version(package: str) -> str:
    """The version of an installed package, or ""."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def _extra() -> str:
    """The extra whose plugin is installed, or ""."""
    return next((extra for extra in OLDEST_DRIVER if _version(f"jax-{extra}-plugin")), "")


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def reached(device: Any, preset_name: PresetName) -> Iterator[Finding]:
    """What a `jax.Device` of this machine is, and what it reaches; of a card with recorded plans, beside its maker's
    figures."""
    from moe_jax.model.precision import Card, choose_policy
    from moe_jax.system import machine

    card, policy = Card.of(device), choose_policy("auto", device)
    if card.platform != "gpu":
        how = "`JAX_PLATFORMS=cuda uv run --extra cuda12 python -c 'import jax; jax.devices()'` prints why"
        yield Finding("JAX", f"sees no card, only {card.name}: {how}", good=False)
        return
    yield Finding("card", f"{card.name}, compute capability {card.capability}")
    yield Finding("computes in", str(policy))
    block = (device.memory_stats() or {}).get("bytes_limit", 0) / MIB
    free = ask_nvidia_smi("memory.free", "memory.total")
    beside = f"; beside it {free[0]} of {free[1]} MiB are free" if free else ""
    yield Finding("memory", f"JAX has taken {block:,.0f} MiB{beside}")
    known = next((c for c in known_cards().values() if c.device_kind == card.name), None)
    rate = machine.matmul_rate(policy.compute, machine.LARGE_SIZE)
    stated = known and (known.float32 if policy.compute == "float32" else known.narrow)
    yield Finding("products", f"{rate / 1e12:,.2f} TFLOP/s in {policy.compute}{_of(rate, stated, 1e12)}")
    run, read = machine.memory_read_benchmark()
    speed = read / machine.alternate({"": run}, machine.ROUNDS)[""].median
    yield Finding("bandwidth", f"{speed / 1e9:,.0f} GB/s{_of(speed, known and known.bandwidth, 1e9)}")
    yield _fit(preset_name, policy.compute, MARGIN * block)
    yield Finding("train with", f"uv run --extra {_extra() or 'cuda12'} train.py --preset {preset_name}")


def _fit(name: PresetName, precision: str, budget: float) -> Finding:
    """Whether a preset fits, by its recorded plans: of the cards that compute in the same precision, the largest whose
    setting fits this budget of MiB."""
    config = with_vocabulary(preset(name))
    for card in sorted(known_cards().values(), key=lambda card: -card.memory):
        plans, _ = recorded(config, card)
        if plans and plans[-1].precision == precision and plans[-1].fits(min(budget, card.budget)):
            fit = f"{plans[-1].name}, {plans[-1].total:,.0f} of {budget:,.0f} MiB"
            return Finding(name, f"fits, by the plan for {card.device_kind}: {fit}")
    why = f"no recorded plan in {precision} fits {budget:,.0f} MiB; `train.py` looks further"
    return Finding(name, why, good=False)


def _of(reached: float, stated: float | None, unit: float) -> str:
    return f", {reached / stated:.0%} of its maker's {stated / unit:,.1f}" if stated else ""

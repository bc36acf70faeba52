"""`moe-jax doctor --gpu --test`: whether a card computes what the CPU computes, and whether runs on it can be trusted.

Each check of `card_checks` runs in a process of its own with a limit of time, so that a crash or a hang is a line, and
not the end. What is computed on the card is computed on the CPU, too, and compared by these rules:

- float32: an array is off from the exact one by at most FLOAT32 of its norm, or by at most TIMES the CPU's own error;
- bfloat16 and float16: by at most TIMES the CPU's own error, which is rounding.

Rates and seconds are recorded and not judged. On a machine without a card, `MOE_JAX_FORMS=gpu` tests the forms of cards
on the CPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FLOAT32, TIMES, LOSS, MEMORY = 1e-5, 3.0, 0.02, 1.1
"""The largest relative error in float32; how many times the CPU's error one may be; the largest difference of mean
losses; how many times the planned memory the peak may be."""
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-9, "float16": 2**-12}
"""Half the distance of neighbours, relative: an error of this size is none."""

type Arrays = Mapping[str, Any]


class Line(NamedTuple):
    """The result of one check."""

    check: str
    result: str
    """`pass`, `FAIL`, or `note`, which is not judged."""
    detail: str
    seconds: float = 0.0


class Failed(Exception):
    """A process of a check that gave no result; the text says why."""


def on_a_cpu() -> bool:
    """Whether the forms of cards are tested on the CPU."""
    return os.environ.get("MOE_JAX_FORMS") == "gpu"


def computed(check: str, preset: str, dtypes: list[str], limit: float, **environment: str) -> Arrays:
    """What a check gives in a process of its own. Raises Failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = folder / "result.npz"
        command = [sys.executable, "-m", "moe_jax.planning.card_checks", check, preset, ",".join(dtypes), str(result)]
        output, env = folder / "output", os.environ | environment
        with (
            output.open("w") as text,
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=text, process_group=0) as process,
        ):
            try:
                status = process.wait(limit)
            except BaseException as error:  # Ctrl-C too: what the check has started ends with it
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise Failed(f"no answer in {limit:,.0f} s") from None
        if status < 0:
            raise Failed(f"crashed: signal {-status}")
        if status or not result.exists():
            lines = output.read_text(errors="replace").strip().splitlines()
            raise Failed(without_paths(lines[-1] if lines else "no error text"))
        with np.load(result) as arrays:
            return dict(arrays)


def without_paths(line: str) -> str:
    """A line of an error without the folders of its user, shortened."""
    return re.sub(r"(?:[A-Za-z]:)?[/\\\\][^\s'\":,)]*[/\\\\]", "", line)[:200]


def off(array: np.ndarray, exact: np.ndarray) -> float:
    """The error of an array, relative to the norm of the exact one. Infinite if a number is not finite."""
    error, size = np.linalg.norm(array - exact), np.linalg.norm(exact)
    return float(error / size if size else error) if np.isfinite(array).all() else np.inf


def compare(card: Arrays, cpu: Arrays) -> tuple[bool, str]:
    """Whether all arrays of the card are as near to the exact ones as the rules ask, and the worst one, in words."""
    worst: tuple[float, str] = 0.0, ""
    for name, array in card.items():
        dtype, _, what = name.partition("/")
        exact = cpu[f"float64/{what}"]
        error, own = off(array, exact), off(cpu[name], exact)
        allowed = max(TIMES * max(own, ROUNDING[dtype]), FLOAT32 if dtype == "float32" else 0.0)
        said = f"{what} in {dtype}: off by {error:.1e} of {allowed:.1e} (CPU {own:.1e})"
        worst = max(worst, (error / allowed, said))
    return worst[0] <= 1, f"{len(card)} arrays; worst {worst[1]}"


def same_losses(card: Arrays, cpu: Arrays) -> tuple[bool, str]:
    names = [name for name in card if not name.startswith("skipped")]
    skipped = sum(int(card[f"skipped in {name}"]) for name in names)
    means = [(float(np.nan_to_num(abs((card[name] - cpu[name]).mean()), nan=np.inf)), name) for name in names]
    apart, worst = max(means)
    return apart <= LOSS and not skipped, f"mean losses {apart:.1e} apart in {worst}; {skipped} steps skipped"


def same_text(card: Arrays, cpu: Arrays) -> tuple[bool, str]:
    ours, theirs = card["float32/tokens"], cpu["float32/tokens"]
    same = ours.shape == theirs.shape and bool((ours == theirs).all())
    first = "" if same else f"; the first other one is number {int(np.argmax(ours != theirs)) + 1}"
    return same, f"{len(ours)} tokens of `stories`{first}"


def same_bits(card: Arrays, _: Arrays) -> tuple[bool, str]:
    again, restored, arrays = (int(card[name]) for name in ("again", "restored", "arrays"))
    return not again + restored, f"{arrays} arrays; other bits in {again} after the step again, in {restored} restored"


def same_after_a_kill(card: Arrays, _: Arrays) -> tuple[bool, str]:
    arrays, differ, step = (int(card[name]) for name in ("arrays", "differ", "resumed from"))
    return (
        not differ and step > 0,
        f"{arrays} arrays; other bits in {differ} after a kill and a resume from step {step}",
    )


def within_the_plan(card: Arrays, _: Arrays) -> tuple[bool, str]:
    """The peak within the plan, and a second setting after the planted error."""
    planned, peak, tried = float(card["planned"]), float(card["peak"]), card["tried"].tolist()
    stepped = len(tried) > 1 and tried[0] != tried[1]
    counted = f"peak {peak:,.0f} of {planned:,.0f} MiB planned" if peak else f"{planned:,.0f} MiB planned, not counted"
    after = "the next setting after a planted out of memory" if stepped else f"tried only {tried}"
    return stepped and peak <= MEMORY * planned, f"{counted}; {after}"


def right_attention(card: Arrays, _: Arrays) -> tuple[bool, str]:
    wrong = {str(said).rstrip(".") for said in card.values()} - {""}
    right = "cuDNN's is right" if card else "this project's own: nothing is computed in 16 bits here"
    detail = f"this project's own, because of cuDNN's: {', '.join(sorted(wrong))}" if wrong else right
    return not any("wrong numbers" in said for said in wrong), detail


def rates(card: Arrays, _: Arrays) -> tuple[bool, str]:
    units = {"compile": "{:,.0f} s", "train": "{:,.0f} tokens/s", "write": "{:,.0f} tokens/s", "loss": "{:.3f}"}
    return True, ", ".join(f"{name} {units[name.split()[0]].format(float(x))}" for name, x in card.items())


class Check(NamedTuple):
    """How a check is judged."""

    judge: Callable[[Arrays, Arrays], tuple[bool, str]]
    limit: float
    """Seconds, for the card and for the CPU."""
    beside: tuple[str, ...] | None
    """The dtypes that the CPU computes besides the card's, or None if nothing is compared."""


CHECKS = {
    "forms": Check(compare, 300, ("float64",)),
    "attention": Check(right_attention, 300, None),
    "gradients": Check(compare, 600, ("float64",)),
    "steps": Check(same_losses, 600, ()),
    "twice": Check(same_bits, 300, None),
    "memory": Check(within_the_plan, 600, None),
    "text": Check(same_text, 300, ()),
    "loop": Check(rates, 900, None),
}
LONG = {"resume": Check(same_after_a_kill, 3600, None)}
"""What `--long` adds."""


def lines(preset: str, record: dict[str, Any], names: Iterable[str]) -> Iterator[Line]:
    """The line of each check, as soon as it is known. `record` gets the facts and the lines, for a file to send."""
    try:
        facts = {name: value.item() for name, value in computed("facts", preset, ["float32"], 120).items()}
    except Failed as error:
        yield Line("facts", "FAIL", str(error))
        return
    dtypes = ["float32", "bfloat16", "float16"] if on_a_cpu() else list(dict.fromkeys(["float32", facts["compute"]]))
    if facts["platform"] != "gpu" and not on_a_cpu():
        yield Line("facts", "FAIL", f"JAX sees no card, only {facts['device']}: `moe-jax doctor --gpu` says why")
        return
    yield Line("facts", "note", f"{facts['device']}, jaxlib {facts['jaxlib']}")
    record |= {"facts": facts, "preset": preset, "checks": []}
    for name in names:
        began = time.monotonic()
        passed, detail = result(name, preset, dtypes)
        line = Line(name, "pass" if passed else "FAIL", detail, round(time.monotonic() - began, 1))
        line = line._replace(result="note") if passed and name == "loop" else line
        record["checks"].append(line._asdict())
        yield line


def result(name: str, preset: str, dtypes: list[str]) -> tuple[bool, str]:
    """Whether a check passes, and what it found."""
    check = (CHECKS | LONG)[name]
    where = "on the card"
    try:
        dtypes = dtypes[-1:] if name == "steps" else dtypes  # that of training; float32 takes as long again
        card, cpu = computed(name, preset, dtypes, check.limit), {}
        if check.beside is not None:
            where = "on the CPU"
            both = [*dtypes, *check.beside]
            cpu = computed(name, preset, both, check.limit, JAX_PLATFORMS="cpu", MOE_JAX_FORMS="")
        return check.judge(card, cpu)
    except Failed as error:
        return False, f"{where}: {error}"


def write(record: Mapping[str, Any]) -> Path:
    """Write card-NAME.json into this folder."""
    name = re.sub(r"[^a-z0-9]+", "-", record["facts"]["device"].lower()).strip("-")
    path = Path(f"card-{name}.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path

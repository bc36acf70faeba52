"""The time of each part on a card, as the roofline predicts it and as the card takes it; the memory of a step; and
gradients, compared with those of the processor.

    uv run --extra gpu-plan python benchmarks/predict_card.py --gpu rtx3050-4gb
    uv run --extra cuda12 python benchmarks/predict_card.py

Without a card nothing is measured: the parts are compiled for a described card, and only predictions are printed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from predicted.card_parts import Part, parts
from predicted.roofline import predict_program
from rich.console import Console

from moe_jax.cli.main import main
from moe_jax.config import ConfigError, ExecutionConfig, RunConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model.transformer import Params, merge
from moe_jax.planning import ladder
from moe_jax.planning.target import DEFAULT_GPU, Target, load_target
from moe_jax.system.environment import MIB
from moe_jax.system.files import json_text
from moe_jax.system.machine import alternate
from moe_jax.system.terminal import working
from moe_jax.training.loss import training_loss
from moe_jax.training.programs import Programs
from moe_jax.training.state import initial_params


class Row(NamedTuple):
    """A part, predicted and measured, in milliseconds."""

    group: str
    name: str
    predicted: float | None
    """None if the compiler does not know how often a loop of the program runs."""
    measured: float | None
    """None without a card."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return ratio(self.predicted, self.measured)


def target_of_device(device: Any) -> Target:
    """The target for a card in this machine, read from its driver."""
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage], there is no public API for it

    name = str(device.device_kind)
    return Target(name, str(_jax.get_topology_for_devices([device]).target_config))


def measured_peak(config: RunConfig) -> float:
    """Peak memory of the first device in MiB, until the end of the second training step."""
    device = jax.devices()[0]
    programs = Programs.of(config, device)
    state = programs.state(initial_params(config, jax.random.key(config.train.seed)))
    shapes = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    tokens = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for _ in range(2):
        state, _ = programs.step(state, tokens)
    jax.block_until_ready(state)
    return device.memory_stats()["peak_bytes_in_use"] / MIB


def gpu(console: Console, config: RunConfig, name: str, rounds: int) -> dict[str, Any]:
    """Predict each part for the card in this machine, and measure it there. Without a card in this machine, predict for
    the card `name`, or for DEFAULT_GPU if `name` is empty.

    The settings are those of `plan`: the first that fit the card. Raises ConfigError if a name is given although this
    machine has a card.
    """
    device = jax.devices()[0]
    card = device if device.platform == "gpu" else None
    if card is not None and name:
        raise ConfigError(f"--gpu {name}: this machine has a card, {card.device_kind}, which is measured; leave it out")
    target = load_target(name or DEFAULT_GPU) if card is None else target_of_device(card)
    console.print(_headline(target, card is not None), soft_wrap=True)
    plan = ladder.chosen(list(ladder.walk(config, ladder.Room.on(target))), target.budget)
    chosen, summary = plan.config, plan.summary(target.name, target.budget)
    found: dict[str, Any] = {"card": target.name, "measured": card is not None}
    found["setting"] = {key: summary[key] for key in ("optimizer", "remat", "precision", "fits")}
    peak = None if card is None else measured_peak(chosen)  # before anything else takes memory
    found["step_mib"] = _beside(plan.programs.get("step", plan.least), peak)
    _say_memory(console, found["step_mib"])
    rows: list[Row] = []
    for part in parts(chosen, card or target):
        if not rows or rows[-1].group != part.group:
            console.print(f"\n[bold]{heading(part.group, card is not None)}[/bold]")
        rows.append(_row(part, target, card, rounds))
        console.print(line(rows[-1]))
    found["parts"] = {row.name: _beside(row.predicted, row.measured) for row in rows}
    if card is not None:
        found["gradients_beside_cpu"] = difference = gradients_beside_cpu(card)
        console.print(
            f"\ngradients of nano in float32: at most {difference:.1e} from those of this machine's processor"
        )
        console.print("next: uv run --extra cuda12 python -m moe_jax certify", soft_wrap=True)
    return found


def _headline(target: Target, here: bool) -> str:
    said = f"{target.device_kind}, compute capability {target.compute_capability}"
    if here:
        return f"{said}: predicted by the roofline, and measured"
    return f"{said}: predicted by the roofline. [bold]Nothing is measured: no NVIDIA GPU is visible to JAX[/bold]"


def _row(part: Part, target: Target, card: Any, rounds: int) -> Row:
    with working(f"compiling: {part.name}"):
        prediction = predict_program(target, part.program, *part.shapes)
    predicted = None if prediction is None else prediction.milliseconds
    if card is None:
        return Row(part.group, part.name, predicted, None)
    with working(f"measuring: {part.name}"):
        seconds = alternate({"": part.call()}, rounds)[""].median
    return Row(part.group, part.name, predicted, 1e3 * seconds)


def ratio(predicted: float | None, measured: float | None) -> float | None:
    """Measured over predicted. None unless both are known."""
    return measured / predicted if measured and predicted else None


def _beside(predicted: float | None, measured: float | None) -> dict[str, float | None]:
    return {"predicted": predicted, "measured": measured, "ratio": ratio(predicted, measured)}


def heading(group: str, measured: bool) -> str:
    """The names of the columns."""
    columns = ("predicted ms", "measured ms", "ratio") if measured else ("predicted ms",)
    return f"{group:<40}" + "".join(f"{name:>13}" for name in columns)


def line(row: Row) -> str:
    """A part, and its numbers. What is not known is a question mark."""
    numbers = (row.predicted,) if row.measured is None else (row.predicted, row.measured, row.ratio)
    return f"  {row.name:<38}" + "".join(f"{'?' if n is None else f'{n:,.3g}':>13}" for n in numbers)


def _say_memory(console: Console, mib: dict[str, float | None]) -> None:
    measured = "" if mib["measured"] is None else f", {mib['measured']:,.0f} MiB measured"
    console.print(f"memory of a training step: {mib['predicted']:,.0f} MiB planned{measured}")


def gradients_beside_cpu(card: Any) -> float:
    """The loss's gradients of `nano` in float32 on a device and on this machine's processor: the largest difference in
    any parameter, over the largest gradient of that parameter."""
    config = dataclasses.replace(with_vocabulary(preset("nano")), execution=ExecutionConfig(compute_dtype="float32"))
    programs = Programs.of(config, card)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (4, config.model.seq_len + 1))

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        return training_loss(merge(programs.graphdef, params), tokens, None, config.train)[0]

    params = programs.initial_params()
    found = [
        jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(*jax.device_put((params, jnp.asarray(tokens)), device)))
        for device in (jax.devices("cpu")[0], card)
    ]
    return largest_difference(*found)


def largest_difference(expected: Params, found: Params) -> float:
    """Of any two arrays, over the largest magnitude of the expected one. An array of zeros must be zeros."""

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        apart, largest = float(np.abs(a - b).max()), float(np.abs(a).max())
        return apart / largest if largest else (0.0 if apart == 0 else float("inf"))

    return max(jax.tree.leaves(jax.tree.map(difference, expected, found)))


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the model")
    parser.add_argument("--gpu", default="", help=f"the card to predict for without one; {DEFAULT_GPU} unless given")
    parser.add_argument("--rounds", type=int, default=9, help="how often each part runs on a card")
    asked = parser.parse_args(argv)
    load_target(asked.gpu or DEFAULT_GPU)
    console = Console()
    print(json_text(gpu(console, with_vocabulary(preset(asked.preset)), asked.gpu, asked.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))

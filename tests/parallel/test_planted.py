"""Planted bugs of a mesh are seen in the losses, and a sum in every micro-batch in the compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.certify.hlo import calls, parse
from moe_jax.parallel import experts
from moe_jax.parallel.layout import AXES, Layout, mesh_of
from moe_jax.training import gradients as gradients_module
from moe_jax.training.gradients import gradients
from moe_jax.training.loss import training_loss
from moe_jax.training.programs import Programs
from tests.parallel import made

pytestmark = pytest.mark.parallel


def swapped(experts: Any, rows: jax.Array, gate: jax.Array) -> jax.Array:
    """`exchange` without the way back by all-to-all: results land in the slots of other sequences."""
    there, gates = (jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=1, tiled=True) for x in (rows, gate))
    return experts(there, gates).reshape(rows.shape)


def unsummed(layout: Layout, grads: Any) -> Any:
    """Each device keeps its own gradients."""
    del layout
    return grads


def keyed_by_device(*args: Any, blocks: Any, **kwargs: Any) -> Any:
    """Every device draws the dropout of the first sequences."""
    return gradients(*args, blocks=blocks - jax.lax.axis_index(AXES), **kwargs)


@pytest.mark.parametrize(
    ("owner", "name", "planted"),
    [
        (experts, "exchange", swapped),
        (Layout, "mean_gradients", unsummed),
        (gradients_module, "gradients", keyed_by_device),
    ],
    ids=["results in wrong slots", "gradients not summed", "dropout by device"],
)
def test_a_planted_bug_is_seen(owner: Any, name: str, planted: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 13 of the strict list: within three steps the losses leave those of one device."""
    _, expected = made.train(made.programs(grad_accum=2), 3)
    monkeypatch.setattr(owner, name, planted)
    config = made.config("expert=8", grad_accum=2)
    _, losses = made.train(Programs.of(config, mesh=mesh_of("expert=8")), 3)
    assert np.abs(np.array(losses) - expected).max() > 1e-4


def looped_collectives(programs: Programs) -> set[str]:
    """The kinds of collectives in the loops of a training step of two micro-batches."""
    computations, entry = parse(programs.compiled_step(made.B, 2).as_text())
    found: set[str] = set()

    def visit(name: str, looped: bool) -> None:
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if looped and kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
                found.add(kind)
            for _, called in calls(instruction):
                if called in computations:
                    visit(called, looped or instruction.opcode == "while")

    visit(entry, False)
    return found


def test_gradients_are_summed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 5 of the strict list: in the loop over micro-batches only tokens travel, to their experts and back. A sum
    that is planted there is found."""

    def reduced(model: Any, *inputs: Any, **named: Any) -> Any:
        value, metrics = training_loss(model, *inputs, **named)
        return value, metrics._replace(load=jax.lax.pmean(metrics.load, AXES))

    for mesh, allowed in (("data=8", set()), ("expert=8", {"all-to-all"})):
        config = made.config(mesh, grad_accum=2)
        assert looped_collectives(Programs.of(config, mesh=mesh_of(mesh))) == allowed
    monkeypatch.setattr(gradients_module, "training_loss", reduced)
    planted = Programs.of(made.config("data=8", grad_accum=2), mesh=mesh_of("data=8"))
    assert looped_collectives(planted) == {"all-reduce"}

"""The certificates of a mesh pass on every mesh, and fail on programs that are wrong or that send too much."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax.certify import Certificate
from moe_jax.certify.arithmetic import part_products
from moe_jax.certify.collectives import read_collectives
from moe_jax.certify.mesh import certify_collectives, certify_mesh, divided_arithmetic, ideal_bytes
from moe_jax.certify.model import initial_params
from moe_jax.parallel import experts
from moe_jax.parallel.layout import AXES, Layout, mesh_of
from moe_jax.system.hlo import read_program
from moe_jax.training import on_mesh
from moe_jax.training.loss import training_loss
from moe_jax.training.programs import Programs
from moe_jax.training.step import gradients, make_step
from tests.parallel import made

pytestmark = pytest.mark.parallel


def failed(certificates: Iterator[Certificate]) -> list[str]:
    return [f"{c.name}: {c.found}; asked {c.asked}" for c in certificates if not c.passed]


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        pytest.param("data=8", {"optimizer": "muon", "grad_accum": 2}, marks=pytest.mark.slow),
        pytest.param("expert=8", {"remat": True}, marks=pytest.mark.slow),
        pytest.param("data=2,expert=4", {"optimizer": "adafactor"}, marks=pytest.mark.slow),
        ("fsdp=2,expert=4", {"optimizer": "muon", "grad_accum": 2}),
        pytest.param("fsdp=8", {"optimizer": "adamw-8bit", "dispatch": "blocks"}, marks=pytest.mark.slow),
        ("fsdp=2,expert=4", {"dispatch": "blocks", "remat": True, "compute_dtype": "bfloat16"}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_every_certificate_passes(mesh: str, changes: dict[str, Any]) -> None:
    """Numbers 2, 4 and 5 of the strict list: causality under drops, exact bytes, gradients summed once a step."""
    config = made.config(mesh, **changes)
    found = mesh_of(mesh)
    assert found is not None
    certificates = list(certify_mesh(config, initial_params(config), found))
    assert len(certificates) == 5
    assert failed(iter(certificates)) == []


@pytest.mark.parametrize(
    ("axes", "passed"),
    [
        ("data=8", ["products of a device", "tokens travel to their experts"]),
        ("data=2,expert=4", ["products of a device"]),
    ],
)
def test_the_plain_step_divided_by_the_compiler_fails(axes: str, passed: list[str]) -> None:
    """The step of one device, divided by GSPMD: the batch over all devices, the experts over `expert`. It divides the
    products well. But tokens are gathered, gradients are summed in every micro-batch, and no token travels by
    all-to-all (a data mesh needs none)."""
    config = made.config(grad_accum=2)
    mesh = mesh_of(axes)
    assert mesh is not None
    programs = made.programs(grad_accum=2)
    layout = Layout.of(mesh, programs.param_shapes, jax.tree.map(lambda _: False, programs.param_shapes))
    state = layout.state(programs.state_shapes)
    plain = make_step(programs.training_graphdef, programs.optimizer, config.train, False)
    divided = jax.jit(
        lambda s, b: plain(s, b), in_shardings=(state, NamedSharding(mesh, layout.batch)), out_shardings=(state, None)
    )
    shapes = (programs.state_shapes, programs.batch_shapes(made.B, 2))
    text = divided.lower(*shapes).compile().as_text()
    needed = {part: 2 * flops for part, flops in part_products(programs, made.B // mesh.size).items()}
    certificates = [divided_arithmetic(read_program(text), needed, mesh.size)]
    certificates += certify_collectives(read_collectives(text), ideal_bytes(config, programs.param_shapes, layout, 4))
    assert [c.name.removeprefix("mesh: ") for c in certificates if c.passed] == passed


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
    [(experts, "exchange", swapped), (Layout, "mean_gradients", unsummed), (on_mesh, "gradients", keyed_by_device)],
    ids=["results in wrong slots", "gradients not summed", "dropout by device"],
)
def test_a_planted_bug_is_seen(owner: Any, name: str, planted: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 13 of the strict list: within three steps the losses leave those of one device."""
    _, expected = made.train(made.programs(grad_accum=2), 3)
    monkeypatch.setattr(owner, name, planted)
    config = made.config("expert=8", grad_accum=2)
    _, losses = made.train(Programs.of(config, mesh=mesh_of("expert=8")), 3)
    assert np.abs(np.array(losses) - expected).max() > 1e-4


def test_a_sum_in_every_micro_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 5 of the strict list, planted: something is summed inside the loop over micro-batches."""

    def summed_often(*args: Any, **kwargs: Any) -> Any:
        def reduced(model: Any, *inputs: Any, **named: Any) -> Any:
            value, metrics = training_loss(model, *inputs, **named)
            return value, metrics._replace(load=jax.lax.pmean(metrics.load, AXES))

        return gradients(*args, loss=reduced, **kwargs)

    monkeypatch.setattr(on_mesh, "gradients", summed_often)
    config, mesh = made.config("data=8", grad_accum=2), mesh_of("data=8")
    assert mesh is not None
    programs = Programs.of(config, mesh=mesh)
    assert programs.layout is not None
    collectives = read_collectives(programs.compiled_step(made.B, 2).as_text())
    found = failed(certify_collectives(collectives, ideal_bytes(config, programs.param_shapes, programs.layout, 4)))
    assert len(found) == 1
    assert "in a loop" in found[0]

"""Dispatch by blocks while the experts lie on several devices: rows, drops, outputs and gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.certify.model import initial_params
from moe_jax.model.moe.dispatch import QueuedPairs
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.moe.router import Routing, route
from moe_jax.model.transformer import build_layer
from moe_jax.parallel.experts import ExchangedBlocks, ExpertParallelMoE
from moe_jax.parallel.layout import AXES, mesh_of
from tests.parallel import made
from tests.support import oracles, tiny

B, T, E, K, N = 16, 8, 8, 2, 4
"""16 sequences on 2 x 4 devices, each of which holds 2 experts along its axis `expert`. T * K is a power of 2, so that
shares are exact."""


def test_rows_of_a_device_worked_by_hand() -> None:
    """Four experts on two devices: A and B on device 0, C and D on device 1. A device has 3 rows for a sequence.

    Token 0 wants A and B, both on device 0: its rows 0 and 1. Token 1 wants A and C: row 2 of device 0, row 0 of
    device 1. Token 2 wants B and D: device 0 is full, so B is dropped, and D gets row 1. Token 3 has a NaN: it takes no
    row. Token 4 wants D and C: row 2, and then device 1 is full too.
    """
    wanted = ["AB", "AC", "BD", "AB", "DC"]
    logits = np.zeros((1, 5, 4), np.float32)
    for t, names in enumerate(wanted):
        for place, name in enumerate(names):
            logits[0, t, "ABCD".index(name)] = 9 - place
    logits[0, 3, 0] = np.nan
    plan = ExchangedBlocks(devices=2, rows=3).plan(route(jnp.asarray(logits), 2))
    none = 6
    assert plan.row.tolist() == [[[0, 1], [2, 3], [none, 4], [none, none], [5, none]]]
    assert plan.keep.tolist() == [[[True, True], [True, True], [False, True], [False, False], [True, False]]]
    assert plan.pair.tolist() == [[[0, 1, 2]], [[3, 5, 8]]]


def later_first(queues: ExchangedBlocks, routing: Routing) -> QueuedPairs:
    """A leak: of a device's rows, later tokens get the first ones."""
    found = _trace(queues, jax.tree.map(lambda x: x[:, ::-1], routing))
    return jax.tree.map(lambda x: x[:, ::-1], found)


def with_a_total(queues: ExchangedBlocks, routing: Routing) -> QueuedPairs:
    """Another bound: all sequences of a source share half of a device's rows, and the first sequences get them."""
    found = _trace(queues, routing)
    total = _trace(queues, jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), routing)).position
    half = queues.rows * len(found.keep) // 2
    return found._replace(keep=found.keep & (total.reshape(found.keep.shape) < half))


_trace = ExchangedBlocks.trace


@pytest.mark.parallel
@pytest.mark.parametrize(("planted", "alone_changes"), [(later_first, False), (with_a_total, True)])
def test_the_causality_certificate_sees_other_orders(
    planted: Callable[..., QueuedPairs], alone_changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alone_changes`: whether outputs of the sequence change whose tokens stay the same."""
    monkeypatch.setattr(ExchangedBlocks, "trace", planted)
    config = made.config("expert=8", dispatch="blocks")
    found = made.mesh_causality(config, initial_params(config))
    assert not found.passed
    assert " 0 earlier outputs changed" not in found.found
    assert ("and 0 of the sequence that was left alone" not in found.found) == alone_changes


@functools.lru_cache
def layer(moe: type[MoE], factor: float) -> tuple[Any, Any]:
    """Definition and random parameters of a layer, in float64. Its first input is 1 for every token, so that the first
    row of the router is a bias."""
    config = tiny.config(experts=E, top_k=K, seq_len=T, dispatch="blocks", device_capacity_factor=factor)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build_layer(config, nnx.Rngs(params=jax.random.key(0)), moe)))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda s: rng.normal(size=s.shape), nnx.to_pure_dict(state))


def merged(moe: type[MoE], factor: float, params: Any) -> Any:
    return nnx.merge(layer(moe, factor)[0], nnx.State(jax.tree.map(lambda p: p, params)))


@functools.lru_cache
def on_devices(factor: float):
    """(parameters, x, cotangent) -> y, share dropped of each sequence, gradients of parameters and x, on 2 x 4
    devices."""

    def run(params: Any, x: Any, cotangent: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            y, stats = merged(ExpertParallelMoE, factor, params)(x, Mode.TRAIN)
            return y, stats.drop_fraction

        y, pull, dropped = jax.vjp(forward, params, x, has_aux=True)
        grads, d_x = pull(cotangent)
        grads = {
            "router": jax.lax.psum(grads["router"], AXES),
            "experts": jax.lax.psum(grads["experts"], ("data", "fsdp")),
        }
        return y, dropped, grads, d_x

    mesh = mesh_of(f"data=2,expert={N}")
    assert mesh is not None
    places, rows = {"router": P(), "experts": P("expert")}, P(AXES)
    in_specs, out_specs = (places, rows, rows), (rows, rows, places, rows)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


@jax.jit
def choices(params: Any, x: Any) -> Any:
    return merged(MoE, 2.0, params).route(x).expert_index


@jax.jit
def plain(params: Any, x: Any, cotangent: Any, keep: Any) -> Any:
    """On one device all experts compute all tokens. `keep` [B, T, K] says which choices count."""

    def forward(params: Any, x: Any) -> Any:
        one = merged(MoE, 2.0, params)
        routing = one.route(x)
        everything = jnp.broadcast_to(x.reshape(1, -1, x.shape[-1]), (E, B * T, x.shape[-1]))
        outputs = one.experts(everything).reshape(E, *x.shape)
        chosen = jax.nn.one_hot(routing.expert_index, E) * jnp.where(keep, routing.gate, 0)[..., None]
        return jnp.einsum("btke,ebtd->btd", chosen, outputs)

    y, pull = jax.vjp(forward, params, x)
    return y, *pull(cotangent)


def kept(expert: np.ndarray, rows: int) -> np.ndarray:
    """Whether each choice [B, T, K] finds one of the rows of its expert's device, by loops."""
    own = E // N
    slots = [oracles.assign([[int(e) // own for e in token] for token in sequence], rows) for sequence in expert]
    return np.array([[[slot is not None for slot in token] for token in sequence] for sequence in slots])


def case(favoured: tuple[int, ...]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters, input and cotangent. The favoured experts are chosen by every token, in this order."""
    params = jax.tree.map(np.copy, layer(MoE, 2.0)[1])
    x, cotangent = np.random.default_rng(1).normal(size=(2, B, T, 8))
    x[..., 0] = 1
    for place, expert in enumerate(favoured):
        params["router"][0, expert] += 100 * (2 - place)
    return params, x, cotangent


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("favoured", "factor", "rows", "dropped"),
    [
        ((), 4.0, 16, 0),
        ((), 1.0, 4, None),
        ((4, 5), 4.0, 16, 0),  # everything goes to one device, and its rows suffice for all
        ((4, 5), 1.0, 4, 3 / 4),
        ((7,), 4.0, 16, 0),  # one expert gets every token, the others what is left
        ((7,), 1.0, 4, None),
    ],
)
def test_outputs_drops_and_gradients(
    favoured: tuple[int, ...], factor: float, rows: int, dropped: float | None, float64: None
) -> None:
    """Against all experts on all tokens, with the choices that a loop keeps. Some experts get nothing at all."""
    params, x, cotangent = case(favoured)
    expert = np.asarray(choices(params, x))
    assert set(favoured) <= set(expert[0, 0].tolist())
    keep = kept(expert, rows)
    lost = (~keep).mean((1, 2))
    assert (lost == dropped).all() if dropped is not None else 0.02 < lost.mean() < 0.9
    y, drops, grads, d_x = on_devices(factor)(params, x, cotangent)
    expected = plain(params, x, cotangent, keep)
    np.testing.assert_array_equal(drops, lost.astype(np.float32))
    errors = tiny.gradient_errors((y, grads, d_x), expected)
    assert max(errors.values()) < 1e-12, errors
    nothing = [e for e in range(E) if not (keep & (expert == e)).any()]
    assert len(nothing) == (6 if favoured == (4, 5) else 0)
    for gradient in grads["experts"].values():
        assert (np.asarray(gradient)[nothing] == 0).all()

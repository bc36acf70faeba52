"""Where every parameter and every leaf of every optimizer's state lies."""

from typing import Any, get_args

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError, OptimizerKind, PresetName, TrainConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model.transformer import abstract_model
from moe_jax.parallel.layout import (
    LOGICAL_AXES,
    Layout,
    leaf_name,
    mesh_axes,
    mesh_of,
    parameter_spec,
)
from moe_jax.training.optimizers.factory import make_optimizer, needs_whole_matrices
from moe_jax.training.state import initial_state
from tests.support import tiny

MESH: Any = AbstractMesh((2, 2, 2), ("data", "fsdp", "expert"))
BLOCK = "blocks.0"


def shapes(**changes: Any) -> Any:
    return abstract_model(tiny.config(**({"width": 64, "expert_hidden": 32, "layers": 1} | changes)))[1]


def test_the_specs_of_a_model() -> None:
    found = Layout.of(MESH, shapes(shared_experts=1), jax.tree.map(lambda _: False, shapes(shared_experts=1))).params
    assert {name: spec for name, spec in found.items() if any(spec)} == {
        "embedding": P(None, "fsdp"),
        f"{BLOCK}.attention.qkv": P("fsdp", None),
        f"{BLOCK}.attention.out": P(None, "fsdp"),
        f"{BLOCK}.ffn.experts.w_in": P("expert", "fsdp", None),
        f"{BLOCK}.ffn.experts.w_gate": P("expert", "fsdp", None),
        f"{BLOCK}.ffn.experts.w_out": P("expert", None, "fsdp"),
        f"{BLOCK}.ffn.shared.w_in": P(None, "fsdp", None),
        f"{BLOCK}.ffn.shared.w_gate": P(None, "fsdp", None),
        f"{BLOCK}.ffn.shared.w_out": P(None, None, "fsdp"),
    }
    assert found[f"{BLOCK}.ffn.router"] == P()


@pytest.mark.parametrize("name", get_args(PresetName))
def test_every_matrix_of_every_preset_is_in_the_table(name: str) -> None:
    """So no large array is left whole on every device by an oversight. Routers are small."""
    assert name in PRESETS
    model = with_vocabulary(preset(name)).model
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_model(model)[1]):
        found = leaf_name(path)
        if leaf.ndim >= 2 and not found.endswith(".router"):
            assert len(LOGICAL_AXES[".".join(found.split(".")[-2:])]) == leaf.ndim, found
            assert "fsdp" in parameter_spec(found, MESH)


@pytest.mark.parametrize(("dense", "first"), [("none", "expert"), ("active", None)])
def test_an_axis_that_cannot_be_divided_evenly_is_whole(dense: str, first: str | None) -> None:
    """A dense model has one network, and the mesh two devices along `expert`."""
    layout = Layout.of(MESH, shapes(), jax.tree.map(lambda _: False, shapes()))
    placed = {leaf_name(path): leaf.sharding.spec for path, leaf in leaves(layout.placed_shapes(shapes(dense=dense)))}
    assert placed[f"{BLOCK}.ffn.experts.w_in"] == P(first, "fsdp", None)


def state_specs(optimizer: OptimizerKind) -> dict[str, P]:
    """Name -> spec of every leaf of a state that is cut."""
    config = TrainConfig(optimizer=optimizer)
    params = shapes()
    layout = Layout.of(MESH, params, needs_whole_matrices(params, config))
    state = jax.eval_shape(lambda p: initial_state(p, make_optimizer(config), False), params)
    found = {leaf_name(path): (leaf, layout.state_spec(leaf_name(path), leaf.shape)) for path, leaf in leaves(state)}
    for name, (leaf, spec) in found.items():
        assert len(spec) <= leaf.ndim, name
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis is None or size % MESH.shape[axis] == 0, name
    return {name: spec for name, (_, spec) in found.items() if any(spec) and name.startswith("optimizer.")}


def leaves(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree)


EXPERTS = f"{BLOCK}.ffn.experts"
TABLE = {"embedding": P(None, "fsdp"), f"{BLOCK}.attention.qkv": P("fsdp", None)}
TABLE |= {f"{BLOCK}.attention.out": P(None, "fsdp"), f"{EXPERTS}.w_out": P("expert", None, "fsdp")}
TABLE |= {f"{EXPERTS}.{name}": P("expert", "fsdp", None) for name in ("w_in", "w_gate")}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16"])
def test_moments_lie_as_their_parameters(optimizer: OptimizerKind) -> None:
    expected = {f"optimizer.0.{m}.{name}": spec for m in ("mu", "nu") for name, spec in TABLE.items()}
    assert state_specs(optimizer) == expected


def test_factors_of_adafactor() -> None:
    """`row` has lost the last axis, `column` the last but one."""
    expected = {
        "embedding.column": P("fsdp"),
        f"{BLOCK}.attention.qkv.row": P("fsdp"),
        f"{BLOCK}.attention.out.column": P("fsdp"),
        **{f"{EXPERTS}.{name}.row": P("expert", "fsdp") for name in ("w_in", "w_gate")},
        **{f"{EXPERTS}.{name}.column": P("expert", None) for name in ("w_in", "w_gate")},
        f"{EXPERTS}.w_out.row": P("expert", None),
        f"{EXPERTS}.w_out.column": P("expert", "fsdp"),
    }
    found = state_specs("adafactor")
    assert found == {f"optimizer.0.second.{name}": spec for name, spec in expected.items()}


def test_momentum_of_muon_is_whole_along_fsdp() -> None:
    """Only what AdamW updates, the embedding, is cut over fsdp."""
    adamw = {f"optimizer.inner_states.adamw.inner_state.0.{m}.embedding": P(None, "fsdp") for m in ("mu", "nu")}
    muon = "optimizer.inner_states.muon.inner_state.0.mu"
    experts = {f"{muon}.{EXPERTS}.{name}": P("expert", None, None) for name in ("w_in", "w_gate", "w_out")}
    assert state_specs("muon") == adamw | experts


def test_blocks_of_8_bit_moments_are_cut_over_experts() -> None:
    """4 experts of 64 x 32 are 16 blocks of 128 for each of two devices. Other arrays are whole."""
    expected = {
        f"optimizer.0.{m}.{EXPERTS}.{name}.{part}": P("expert")
        for m in ("first", "second")
        for name in ("w_in", "w_gate", "w_out")
        for part in ("codes", "scale")
    }
    assert state_specs("adamw-8bit") == expected


def test_the_axes_of_adapters() -> None:
    """Of a matrix [D, F]: a is [D, R], b is [R, F]. Of experts [E, D, F] the first axis stays."""
    assert mesh_axes("blocks.0.attention.qkv_lora.a") == ("fsdp", None)
    assert mesh_axes("blocks.0.attention.qkv_lora.b") == (None, None)
    assert mesh_axes("blocks.1.ffn.experts.w_out_lora.a") == ("expert", None, None)
    assert mesh_axes("blocks.1.ffn.experts.w_out_lora.b") == ("expert", None, "fsdp")
    assert mesh_axes("embedding") == (None, "fsdp")
    assert mesh_axes("blocks.1.ffn.router") == mesh_axes("norm.scale") == ()


def test_a_leaf_of_a_state_belongs_to_the_longest_name() -> None:
    """`norm.scale` ends `ffn_norm.scale`, and `head` is no part of `heads`."""
    layout = Layout.of(MESH, shapes(), jax.tree.map(lambda _: False, shapes()))
    assert layout._parameter_in(f"optimizer.0.mu.{BLOCK}.ffn_norm.scale") == (f"{BLOCK}.ffn_norm.scale", "")
    assert layout._parameter_in("optimizer.0.mu.norm.scale") == ("norm.scale", "")
    assert layout._parameter_in(f"optimizer.0.second.{BLOCK}.attention.qkv.row") == (f"{BLOCK}.attention.qkv", "row")
    assert layout._parameter_in("optimizer.0.count") == (None, "")
    assert layout.state_spec("optimizer.0.count", ()) == P()
    assert layout.state_spec("step", ()) == P()
    assert layout.state_spec("params.embedding", (1, 1)) == P(None, "fsdp")
    with pytest.raises(ValueError, match="the layout does not know what 'trace' of embedding is"):
        layout.state_spec("optimizer.0.embedding.trace", (3,))


def test_blocks_that_a_device_does_not_have_whole_lie_on_every_device() -> None:
    layout = Layout.of(MESH, shapes(), jax.tree.map(lambda _: True, shapes()))
    name = f"optimizer.0.first.{EXPERTS}.w_in.codes"
    assert [layout.state_spec(name, (rows, 128)) for rows in (16, 15)] == [P("expert"), P()]
    assert layout.updates["embedding"] == P(None, None)


def test_a_mesh_has_as_many_places_as_there_are_devices() -> None:
    one = jax.devices()[:1]
    assert mesh_of("data=1", one) is None
    with pytest.raises(ConfigError, match=r"^--mesh data=2: has 2 places, and JAX sees 1 device \(cpu\); give a mesh"):
        mesh_of("data=2", one)
    with pytest.raises(ConfigError, match=r"^--mesh data=4: has 4 places, and JAX sees 3 devices \(cpu\); .* is 3, or"):
        mesh_of("data=4", one * 3)

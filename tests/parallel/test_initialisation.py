"""Parameters and the optimizer's state are made in parts: the bits of one device, and no device holds them whole."""

import dataclasses
import math
from typing import Any

import jax
import pytest

from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.parallel.layout import mesh_of
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.programs import Programs
from tests.parallel import made
from tests.support import short_form, tiny

pytestmark = pytest.mark.parallel


def total(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "optimizer", "changes"),
    short_form(
        [
            ("fsdp=8", "adamw", {"param_dtype": "bfloat16", "tie_value_output_init": True}),
            ("fsdp=2,expert=4", "adamw-8bit", {}),
            ("fsdp=2,expert=4", "adamw", {"lora_rank": 6}),
        ],
        [("fsdp=2,expert=4", "adamw-8bit", {})],
    ),
)
def test_the_initial_state_has_the_bits_of_one_device(mesh: str, optimizer: str, changes: dict[str, Any]) -> None:
    """Every leaf lies where the step wants it, although nobody has moved it."""
    programs, one = made.programs(mesh, optimizer, **changes), made.programs("", optimizer, **changes)
    params = programs.initial_params()
    for x, shape in zip(jax.tree.leaves(params), jax.tree.leaves(programs.state_shapes.params), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)
    tiny.assert_same_bits(jax.device_get(programs.state(params)), jax.device_get(one.state(one.initial_params())))


def test_no_device_makes_the_whole_model() -> None:
    """With fsdp=8 the compiled programs give a device at most 1.05 / 8 of the parameters and of AdamW's moments. While
    they run, their other arrays take at most 1.5 / 8 of the parameters. They send nothing."""
    nano = with_vocabulary(preset("nano"))
    config = dataclasses.replace(nano, train=dataclasses.replace(nano.train, optimizer="adamw"))
    programs = Programs.of(config, mesh=mesh_of("fsdp=8"))
    shapes = programs.state_shapes
    key = purpose_key(0, Purpose.INITIAL_PARAMETERS)
    compiled = [
        programs.initialiser.lower(key).compile(),  # pyright: ignore[reportFunctionMemberAccess]
        programs.placed_state.lower(shapes.params).compile(),  # pyright: ignore[reportFunctionMemberAccess]
    ]
    for program, made_here in zip(compiled, (shapes.params, shapes), strict=True):
        memory = program.memory_analysis()
        assert memory.output_size_in_bytes <= 1.05 / 8 * total(made_here)
        assert memory.temp_size_in_bytes <= 1.5 / 8 * total(shapes.params)
        assert "replica_groups" not in program.as_text()

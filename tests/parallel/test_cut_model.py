"""Evaluation, samples and routing snapshots take the parameters as they lie: cut over the devices of a mesh."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import abstract_model
from moe_jax.parallel.cut_model import EvaluatedTransformer
from moe_jax.system.files import Folder
from moe_jax.training.nonfinite import diagnose
from moe_jax.training.on_mesh import make_mesh_evaluation_step
from moe_jax.training.programs import Programs
from moe_jax.training.state import LossScale
from tests.parallel import made
from tests.support import tiny

pytestmark = pytest.mark.parallel

MESH = "fsdp=2,expert=4"
WIDE: dict[str, Any] = {"width": 128, "expert_hidden": 128}


def written(programs: Programs) -> list[int]:
    """A sample that is longer than the context, so that its end becomes a new prompt. A prompt of 20 tokens goes
    through blocks of experts, and a single token through its own experts."""
    params, prompt = programs.initial_params(), [*range(20)]
    key = jax.random.key(5)
    return [*programs.decoder().stream(params, prompt, settings=Sampling(), key=key, stop=-1, limit=30)]


def test_samples_and_snapshots_are_those_of_one_device() -> None:
    changes: dict[str, Any] = {"layers": 2, "shared_experts": 1, "tied_head": False}
    programs, one = made.programs(MESH, **changes), made.programs(**changes)
    assert written(programs) == written(one)
    stream = tiny.tokens(100, seed=4, vocabulary=made.V)
    found, expected = programs.tracer(stream), one.tracer(stream)
    assert found is not None
    assert expected is not None
    assert found(programs.initial_params()) == expected(one.initial_params())


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", MESH])
def test_snapshots_of_blocks(mesh: str) -> None:
    """With a factor of 4 = E / K no row is missing over `expert`. The second layer's
    choices depend on the outputs of the first one's experts."""
    changes: dict[str, Any] = {"dispatch": "blocks", "layers": 2}
    programs, one = made.programs(mesh, device_capacity_factor=4.0, **changes), made.programs(**changes)
    stream = tiny.tokens(40, seed=4, vocabulary=made.V)
    found, expected = programs.tracer(stream), one.tracer(stream)
    assert found is not None
    assert expected is not None
    assert found(programs.initial_params()) == expected(one.initial_params())


def temporary(layers: int) -> dict[str, int]:
    """Bytes of a device's temporary arrays in an evaluation and in the reading of a prompt. Compiled, not run."""
    programs = made.programs(MESH, layers=layers, **WIDE)
    params, layout = programs.state_shapes.params, programs.layout
    assert layout is not None
    graphdef = abstract_model(programs.config.model, kind=EvaluatedTransformer)[0]

    def tokens(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    weights = jax.ShapeDtypeStruct((16, 16), np.float32)
    evaluation = make_mesh_evaluation_step(layout, graphdef, programs.param_shapes)
    lowered = {
        "evaluation": evaluation.lower(params, tokens(16, 32), tokens(16, 16), tokens(16), weights),  # pyright: ignore
        "prefill": programs.decoder().prefill.lower(params, tokens(1, 32), tokens()),
    }
    return {name: x.compile().memory_analysis().temp_size_in_bytes for name, x in lowered.items()}


def test_one_block_is_gathered_at_a_time() -> None:
    """Two more layers add parameters of 3.7 MB. If all parameters were gathered at the start, a device's temporary
    arrays would grow by as much. They grow by less than 5 % of that: by the keys and values of a prompt."""
    small, large = temporary(1), temporary(3)
    sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.programs(MESH, layers=n, **WIDE).param_shapes))
        for n in (1, 3)
    ]
    added = sizes[1] - sizes[0]
    assert {name: large[name] - small[name] < 0.05 * added for name in small} == {"evaluation": True, "prefill": True}


def test_gradients_that_are_not_finite_are_diagnosed_where_they_lie(tmp_path: Path) -> None:
    """Of a step whose loss is multiplied by infinity, the first gradient that is not finite is named."""
    programs = made.programs(MESH)
    state = programs.state(programs.initial_params())
    state = dataclasses.replace(state, loss_scale=LossScale(jnp.float32(np.inf), jnp.int32(0)))
    given = (programs.training_graphdef, programs.config.train, state, made.batch(0), 1)
    path, first = diagnose(Folder(tmp_path), *given, programs.gradients, made.batch(0))
    assert first == "gradients.blocks.0.attention.out"
    assert json.loads(path.read_text())["not_finite"]["params"] == []

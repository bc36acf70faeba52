"""Samples, snapshots of the routing and diagnoses on a mesh: what one device writes and finds."""

from typing import Any

import jax
import pytest

from moe_jax.inference.sampling import Sampling
from moe_jax.training.programs import Programs
from tests.parallel import made
from tests.support import tiny

pytestmark = pytest.mark.parallel

MESH = "fsdp=2,expert=4"


def whole(programs: Programs) -> Any:
    """The parameters as evaluation and samples take them: on a mesh whole on every device."""
    params = programs.weights(programs.state(programs.initial_params()))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    return params


def written(programs: Programs) -> list[int]:
    """A sample that is longer than the context, so that its end becomes a new prompt. A prompt of 20 tokens goes
    through blocks of experts, and a single token through its own experts."""
    params, prompt = whole(programs), [*range(20)]
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
    assert found(whole(programs)) == expected(whole(one))

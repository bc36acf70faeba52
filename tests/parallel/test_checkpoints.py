"""A checkpoint belongs to a model and not to a mesh: saved on eight devices, it is restored on any other mesh."""

from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax.config import MeshShape
from moe_jax.parallel.layout import mesh_of
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, restore
from moe_jax.training.programs import Programs
from tests.parallel import made
from tests.support import saved_run, short_form, tiny

pytestmark = pytest.mark.parallel


def on(mesh: str) -> Programs:
    """The programs on the first devices, as many as the mesh has."""
    devices = jax.devices()[: MeshShape.parse(mesh).devices]
    return Programs.of(made.config(mesh, "adamw-8bit"), mesh=mesh_of(mesh, devices))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    """A checkpoint of a state that is cut over fsdp and expert, and the state on the host. Its 8-bit moments are cut
    over experts."""
    programs = on("fsdp=2,expert=4")
    state, _ = made.train(programs, 2)
    folder = tmp_path_factory.mktemp("run")
    store = CheckpointStore(folder)
    store.save(state, 2, val_loss=None, elapsed=1.0, context={})
    newest = store.list()[-1]
    assert not state.params["blocks"][0]["ffn"]["experts"]["w_in"].is_fully_replicated
    return newest, jax.device_get(state)


@pytest.mark.parametrize("mesh", short_form(["", "expert=2,data=2", "fsdp=8"], ["", "fsdp=8"]))
def test_restored_on_another_mesh(mesh: str, saved: tuple[Checkpoint, Any], tmp_path: Path) -> None:
    """Number 7 of the strict list: on 1, 2, 4 and 8 devices every bit is there, cut as the new mesh wants it. Saved
    from there again, every array has the same digest."""
    checkpoint, expected = saved
    shapes = on(mesh).state_shapes
    state = restore(checkpoint, shapes)
    tiny.assert_same_bits(jax.device_get(state), expected)
    if mesh:
        cut = jax.tree.map(lambda x, shape: x.sharding.is_equivalent_to(shape.sharding, x.ndim), state, shapes)
        assert all(jax.tree.leaves(cut))
    again = CheckpointStore(tmp_path)
    again.save(state, 2, val_loss=None, elapsed=1.0, context={})
    assert saved_run.array_digests(again.list()[-1]) == saved_run.array_digests(checkpoint)

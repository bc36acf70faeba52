"""A run on a mesh that starts from another model: the bits of one device, and no device holds that model whole."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax.config import DataConfig, RunConfig
from moe_jax.data.token_store import TokenStore, prepare_token_store
from moe_jax.interop import pretrained
from moe_jax.parallel.layout import mesh_of
from moe_jax.training.programs import Programs
from moe_jax.training.start import new_start
from tests.interop import made as hugging_face
from tests.parallel import made
from tests.support import short_form, tiny

pytestmark = pytest.mark.parallel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))


def most_bytes(arrays: list[Any]) -> int:
    """The bytes of the device that has most of some arrays, or of arrays with some shapes."""
    found = dict.fromkeys(jax.devices(), 0)
    for array in arrays:  # not by its parts: they would be arrays too, which live on
        for device in array.sharding.device_set:
            found[device] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return max(found.values())


def assert_starts_as_one(source: Any, config: RunConfig, mesh: str, store: TokenStore) -> None:
    """The parameters have the bits of one device. Each lies where the step wants it, although nobody has moved it.
    Routers may lie elsewhere, because they are small and drawn by all devices."""
    on_mesh, one = Programs.of(config, mesh=mesh_of(mesh)), Programs.of(config)
    params = source.read(on_mesh, store).params
    for (path, x), shape in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(on_mesh.state_shapes.params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert "router" in name or x.sharding.is_equivalent_to(shape.sharding, x.ndim), name
    tiny.assert_same_bits(jax.device_get(params), jax.device_get(source.read(one, store).params))


STARTS = [("--init-from", "fsdp=8"), ("--upcycle", "fsdp=2,expert=4")]


@pytest.mark.parametrize(("flag", "mesh"), short_form(STARTS, STARTS[:1]))
def test_a_public_model(flag: str, mesh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read, a device has at most its own parts of all parameters, and the one that is made."""
    folder = hugging_face.llama(tmp_path / "llama")
    name = flag.removeprefix("--").replace("-", "_")
    start = new_start(dataclasses.replace(made.config(experts=4), **{name: str(folder)}))
    config = start.defaults
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, mesh=mesh))
    source = start.weights()
    assert source is not None
    data = DataConfig(source=str(hugging_face.text_file(tmp_path)))
    store = prepare_token_store(data, tokenizer=source.tokenizer, progress=False, seq_len=config.model.seq_len)
    before, most, placed = jax.live_arrays(), [0], pretrained._placed

    def counted(leaf: Any, parameter: Any) -> jax.Array:
        array = placed(leaf, parameter)
        if leaf.sharding is not None:
            known = {id(a) for a in before}
            most.append(most_bytes([a for a in jax.live_arrays() if id(a) not in known]))
        return array

    monkeypatch.setattr(pretrained, "_placed", counted)
    assert_starts_as_one(source, config, mesh, store)
    programs = Programs.of(config, mesh=mesh_of(mesh))
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(programs.param_shapes))
    share = most_bytes(jax.tree.leaves(programs.state_shapes.params))
    assert share / 2 < max(most) <= share + largest

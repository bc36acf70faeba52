"""`--mesh` is read, and refused in one line where the model or the batch cannot be divided."""

import dataclasses
from typing import Any

import pytest

from moe_jax.config import ConfigError, ExecutionConfig, MeshShape, RunConfig, TrainConfig
from tests.support import tiny


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("", (1, 1, 1), "one device"),
        ("data=1", (1, 1, 1), "one device"),
        ("data=8", (8, 1, 1), "data 8"),
        ("expert=4,data=2", (2, 1, 4), "data 2 x expert 4"),
        ("fsdp=2,expert=4,data=3", (3, 2, 4), "data 3 x fsdp 2 x expert 4"),
    ],
)
def test_a_mesh_is_read(text: str, shape: tuple[int, int, int], words: str) -> None:
    found = MeshShape.parse(text)
    assert found == shape
    assert found.devices == shape[0] * shape[1] * shape[2]
    assert str(found) == words


OTHER = ["8", "data=", "data=0", "data=-2", "data=2,data=2", "model=2", "data=2,", "data=²", "data=99999999"]


@pytest.mark.parametrize("text", OTHER)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MeshShape.parse(text)
    assert str(caught.value) == (
        f"--mesh {text}: must be axes data, fsdp and expert, each at most once with a size of 1 to 65,536, such as "
        "data=2,expert=4"
    )


@pytest.mark.parametrize(
    ("mesh", "model", "train", "problem"),
    [
        ("data=3", {}, {}, "3 devices; --batch-size 8 is not a multiple of 3"),
        ("data=2,expert=8", {}, {}, "16 devices; --batch-size 8 is not a multiple of 16"),
        ("fsdp=4", {"width": 6, "heads": 1}, {}, "must be an fsdp axis that divides --model.width 6 evenly"),
        ("expert=8", {}, {}, "must be an expert axis that divides --experts 4 evenly"),
        (
            "expert=2",
            {"dense": "active"},
            {},
            "must be without an expert axis: --model.dense active has no experts to divide",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    mesh: str, model: dict[str, Any], train: dict[str, Any], problem: str
) -> None:
    """Without the mesh, the same settings are a run. With a mesh of one device too."""
    given = {"model": tiny.config(**model), "train": TrainConfig(batch_size=8, **train)}
    plain = RunConfig(**given)
    dataclasses.replace(plain, execution=ExecutionConfig(mesh="data=1"))
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(plain, execution=ExecutionConfig(mesh=mesh))
    assert str(caught.value).startswith(f"--mesh {mesh}: {problem}")

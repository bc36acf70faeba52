"""The model in one file, in NumPy, beside `jax.grad` and beside the Flax model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundation import one_file, transformer
from foundation.parity import autodiff_value_and_gradient, max_relative_error
from foundation.trained.weights import block_of
from moe_jax.config import ModelConfig, RoutingConfig, TrainConfig
from moe_jax.model.transformer import Forms, create, merge, split
from moe_jax.training.loss import training_loss

SIZES = {"L": 2, "D": 16, "H": 2, "E": 4, "K": 2, "F": 6, "V": 11, "T": 12, "B": 3}
CAPACITY = 6
"""Even shares of 12 tokens, so every expert that is chosen more often drops some."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Parameters in float64 with clear preferences, and windows of T + 1 tokens. The file has these sizes."""
    for name, size in SIZES.items():
        monkeypatch.setattr(one_file, name, size)
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    draw = np.random.default_rng(1)
    params = {name: array + 0.4 * draw.standard_normal(array.shape) for name, array in one_file.init(draw).items()}
    yield params, draw.integers(0, SIZES["V"], (SIZES["B"], SIZES["T"] + 1))
    jax.config.update("jax_enable_x64", before)


def to_foundation(params: dict[str, Any]) -> dict[str, Any]:
    """The same arrays under the names of `transformer.py`."""

    def block(n: int) -> dict[str, Any]:
        norm1, norm2, qkv, out = ({"scale": params[name][n]} for name in ("norm1", "norm2", "qkv", "out"))
        attention = {"qkv": {"kernel": qkv["scale"]}, "out": {"kernel": out["scale"]}}
        moe = {name: params[name][n] for name in ("router", "w_gate", "w_in", "w_out")}
        return {"norm1": norm1, "attention": attention, "norm2": norm2, "moe": moe}

    blocks = [block(n) for n in range(SIZES["L"])]
    return {"embedding": params["embedding"], "blocks": blocks, "norm": {"scale": params["norm"]}}


def test_every_gradient_is_that_of_jax_grad(small: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    """Of the same function in `jax.numpy`. Its only part in common with the file is the mathematics."""
    params, windows = small
    factor = CAPACITY * SIZES["E"] / (SIZES["T"] * SIZES["K"])
    config = transformer.ModelConfig(
        heads=SIZES["H"], capacity_factor=factor, balance_coef=one_file.BALANCE, z_coef=0.0
    )

    def loss(params: dict[str, Any]) -> Any:
        return transformer.loss_forward(params, jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:]), config)[0]

    value, gradient = autodiff_value_and_gradient(loss)(jax.tree.map(jnp.asarray, to_foundation(params)))
    ours, ours_d, loads = one_file.loss_and_gradients(params, windows[:, :-1], windows[:, 1:], CAPACITY)
    assert max(f.max() for f in loads) * SIZES["T"] * SIZES["K"] > CAPACITY, "no choice was dropped"
    assert ours == pytest.approx(float(value), rel=1e-12)
    assert max_relative_error(to_foundation(ours_d), gradient) < 1e-10


def test_loss_and_gradients_are_those_of_the_flax_model(small: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    params, windows = small
    config = ModelConfig(
        vocab_size=SIZES["V"], seq_len=SIZES["T"], layers=SIZES["L"], width=SIZES["D"], heads=SIZES["H"],
        experts=SIZES["E"], expert_hidden=SIZES["F"],
        routing=RoutingConfig(top_k=SIZES["K"], capacity_factor=CAPACITY * SIZES["E"] / (SIZES["T"] * SIZES["K"])),
    )  # fmt: skip
    graphdef, like = split(create(config, jax.random.key(0), Forms("float64")))
    coefficients = TrainConfig(aux_loss_coef=one_file.BALANCE, z_loss_coef=0.0)

    def renamed(flax: Any) -> dict[str, Any]:
        blocks = [block_of(flax["blocks"][n]) for n in range(SIZES["L"])]
        return {"embedding": flax["embedding"], "blocks": blocks, "norm": flax["norm"]}

    # Where `renamed` puts each array of the Flax model says which of our arrays it is.
    places, tree = jax.tree.flatten(like)
    numbered = renamed(jax.tree.unflatten(tree, [np.full(x.shape, i) for i, x in enumerate(places)]))
    ours = jax.tree.leaves(to_foundation(params))
    values = {int(np.ravel(n)[0]): array for n, array in zip(jax.tree.leaves(numbered), ours, strict=True)}
    flax = jax.tree.unflatten(tree, [jnp.asarray(values[i]).reshape(x.shape) for i, x in enumerate(places)])

    def loss(params: Any) -> Any:
        return training_loss(merge(graphdef, params), jnp.asarray(windows), None, coefficients)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(flax)
    found, d, _ = one_file.loss_and_gradients(params, windows[:, :-1], windows[:, 1:], CAPACITY)
    assert found == pytest.approx(float(value), rel=1e-9)
    assert max_relative_error(to_foundation(d), renamed(gradient)) < 1e-9


def test_it_learns_and_writes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A few of its steps, on its own text."""
    for name, value in {"STEPS": 60, "D": 32, "F": 32, "T": 64}.items():
        monkeypatch.setattr(one_file, name, value)
    monkeypatch.setattr(one_file, "held_out", one_file.held_out[:2000])
    one_file.main()
    said = capsys.readouterr().out
    first, last = (float(part.split()[0]) for part in (said.split("loss ")[1], said.split("unseen text: ")[1]))
    share = np.bincount(one_file.train_text) / len(one_file.train_text)
    assert first == pytest.approx(np.log(one_file.V), rel=0.15)
    assert last < -(share * np.log(np.maximum(share, 1e-9))).sum() + 0.1, "worse than counting characters"
    assert "Once upon a time" in said


def test_it_is_one_short_file_of_numpy() -> None:
    source = Path(one_file.__file__).read_text(encoding="utf-8")
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"math", "time", "pathlib", "numpy"}
    assert len(source.splitlines()) <= 300

"""Rounding of weights: against NumPy, at its edges, and through the whole model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.quantized import WEIGHTS, QuantizedMatrix, Weights, quantize, quantized_shapes
from moe_jax.model.transformer import Params
from moe_jax.runs.arrays import named_leaves
from tests.support import tiny

LARGEST = {"int8": 127, "int4": 7}
CASES = {
    "tied": {"layers": 1, "width": 64, "tied_head": True},
    "untied": {
        "layers": 1,
        "tied_head": False,
        "shared_experts": 1,
        "activation": "gelu",
        "bias": True,
        "norm": "layernorm",
    },
}


def rounded(matrix: np.ndarray, weights: Weights) -> tuple[QuantizedMatrix, np.ndarray]:
    """The quantised matrix, and the scale of each entry in float64."""
    found = quantize({"head": jnp.asarray(matrix)}, weights)["head"]
    scale = np.asarray(found.scale, np.float64)
    return found, np.repeat(scale, matrix.shape[0] // len(scale), axis=0)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["normal", "one outlier", "tiny", "huge"])
def test_every_entry_is_the_nearest_code(weights: Weights, kind: str) -> None:
    """An entry is off by at most half a scale. The scale is what the definition says, in its dtype."""
    matrix = np.random.default_rng(0).normal(size=(96, 7)).astype(np.float32)
    matrix *= {"tiny": 1e-30, "huge": 1e35}.get(kind, 1)
    if kind == "one outlier":
        matrix[40, 3] = 1e6
    found, scale = rounded(matrix, weights)
    size = 96 if weights == "int8" else 32
    expected = np.abs(matrix.reshape(-1, size, 7)).max(1) / np.float32(LARGEST[weights])
    assert found.scale.dtype == (jnp.float32 if weights == "int8" else jnp.bfloat16)
    expected = expected.astype(found.scale.dtype)
    assert tiny.relative_error(found.scale, expected) <= (2**-8 if weights == "int4" else 2**-22)
    values = np.asarray(found.astype("float32"), np.float64)
    np.testing.assert_array_less(np.abs(values - matrix), 0.5001 * scale)
    codes = np.rint(values / scale)
    np.testing.assert_array_equal(codes, np.rint(matrix / scale).clip(-LARGEST[weights], LARGEST[weights]))
    if kind == "one outlier":  # the other columns, and in int4 the other groups, keep their own scales
        assert np.abs(values - matrix)[:, :3].max() < 0.5
        assert weights == "int8" or np.abs(values - matrix)[64:, 3].max() < 0.5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_zeros_stay_zeros(weights: Weights) -> None:
    matrix = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    matrix[:, 1] = 0
    found, scale = rounded(matrix, weights)
    assert not np.asarray(found.astype("float32"))[:, 1].any()
    assert not scale[:, 1].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_entry_that_is_not_finite_is_refused_by_name(value: float) -> None:
    _, params = tiny.build(tiny.config())
    changed = jax.tree.map(lambda x: x, params)
    changed["blocks"][1]["ffn"]["experts"]["w_out"] = changed["blocks"][1]["ffn"]["experts"]["w_out"].at[0].set(value)
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.experts\.w_out: has entries that are not finite"):
        quantize(changed, "int8")


def test_an_odd_number_of_inputs_is_refused_in_int4() -> None:
    with pytest.raises(UserError, match="head: has 5 inputs, and int4 packs two into a byte; take --to int8"):
        quantize({"head": jnp.ones((5, 4))}, "int4")


@functools.lru_cache
def models(case: str, weights: Weights) -> tuple[Any, Params, Params]:
    """(definition, quantised parameters, the same weights in float32)."""
    graphdef, params = tiny.build(tiny.config(**CASES[case]))
    quantised = quantize(params, weights)
    plain = jax.tree_util.tree_map_with_path(
        lambda path, q: (
            (q.astype("float32").T if "embedding" in str(path) else q.astype("float32"))
            if isinstance(q, QuantizedMatrix)
            else q
        ),
        quantised,
        is_leaf=lambda q: isinstance(q, QuantizedMatrix),
    )
    return graphdef, quantised, plain


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_rounded_and_what_is_not(weights: Weights) -> None:
    _, params = tiny.build(tiny.config(**CASES["untied"]))
    _, quantised, _ = models("untied", weights)
    before, after = named_leaves(params), named_leaves(quantised)
    matrices = {name.removesuffix(".codes") for name in after if name.endswith(".codes")}
    assert all(after[name] is before[name] for name in before.keys() - matrices)
    layer = [f"attention.{n}" for n in ("out", "qkv")]
    layer += [f"ffn.{part}.{n}" for part in ("experts", "shared") for n in ("w_in", "w_out")]
    assert matrices == {"embedding", "head", *(f"blocks.0.{n}" for n in layer)}
    shapes = quantized_shapes(jax.eval_shape(lambda: params), weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), quantised)


@pytest.mark.parametrize(("case", "weights"), [("tied", "int4"), ("untied", "int8")])
def test_the_model_computes_with_the_rounded_weights(case: str, weights: Weights) -> None:
    """Prefill, and greedy decoding with a cache, as with the same weights in float32."""
    graphdef, quantised, plain = models(case, weights)
    decoder = Decoder(graphdef, tiny.T, tiny.V)
    padded = np.zeros((1, tiny.T), np.int32)
    logits = [decoder.prefill(params, padded, np.int32(3)).logits for params in (quantised, plain)]
    assert tiny.relative_error(*logits) < 1e-5
    texts = [
        list(decoder.stream(params, [0, 0], settings=Sampling(0.0), key=jax.random.key(0), stop=-1, limit=6))
        for params in (quantised, plain)
    ]
    assert texts[0] == texts[1]

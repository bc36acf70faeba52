"""Models small enough to compile in a second or two, and random values for their parameters."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, RoutingConfig
from moe_jax.model.moe.layer import MoE
from moe_jax.model.transformer import Forms, Params, create, split

T, V = 8, 13


def config(**changes: Any) -> ModelConfig:
    """Two layers, four experts, two choices, and slots for half of the pairs, so drops are certain.

    `changes` are fields of `ModelConfig` or of its `RoutingConfig`.
    """
    values = {
        "vocab_size": V,
        "seq_len": T,
        "layers": 2,
        "width": 8,
        "heads": 2,
        "experts": 4,
        "top_k": 2,
        "expert_hidden": 6,
        "capacity_factor": 0.5,
    }
    values |= changes
    policy = {f.name: values.pop(f.name) for f in dataclasses.fields(RoutingConfig) if f.name in values}
    return ModelConfig(**values, routing=RoutingConfig(**policy))


@functools.lru_cache
def build(
    config: ModelConfig,
    seed: int = 0,
    dtype: str = "float32",
    compute: str | None = None,
    remat: bool = False,
    moe: type[MoE] = MoE,
) -> tuple[nnx.GraphDef, Params]:
    """A model whose parameters are all random, with standard deviation 0.5: biases are not 0, norm scales are not 1."""
    compute = compute or dtype
    graphdef, shapes = split(nnx.eval_shape(lambda: create(config, jax.random.key(0), Forms(compute, remat, moe))))
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda s: jax.numpy.asarray(rng.normal(size=s.shape) * 0.5, dtype), shapes)


def tokens(*shape: int, seed: int = 0, vocabulary: int = V) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)


def relative_error(a: Any, b: Any, floor: float = 0.0) -> float:
    """max|a - b| / max(max|a|, max|b|, floor)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.size == 0:
        return 0.0
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max(), floor, 1e-300))


def gradient_errors(a: Any, b: Any) -> dict[str, float]:
    """Relative error of each leaf. Its denominator is at least 1e-5 of the largest entry of all leaves of `b`."""
    floor = 1e-5 * max(float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(b) if x.size)
    paths = jax.tree_util.tree_leaves_with_path(a)
    return {
        jax.tree_util.keystr(path): relative_error(x, y, floor)
        for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True)
    }


def assert_same_bits(a: Any, b: Any) -> None:
    """Assert that two trees are equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()), jax.tree_util.keystr(path)

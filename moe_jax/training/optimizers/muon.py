"""Muon (Jordan et al. 2024): the momentum of each matrix, made nearly orthogonal by five Newton-Schulz steps.

A stack of experts `[E, D, F]` is treated as E matrices. If it were orthogonalised as one matrix, the experts would
share one spectrum.

`optax.contrib.muon` also multiplies the step of a matrix `[in, out]` by sqrt(max(1, out / in)): 1.732 for the `[D, 3D]`
matrix of queries, keys and values. This Muon does not. All its matrices move by about `muon_lr` in spectral norm, and
the presets are tuned for that. Chapter 10 of `foundation` derives the step.
"""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax import contrib

from moe_jax.config.train import NEWTON_SCHULZ_STEPS
from moe_jax.model.precision import dot_precision
from moe_jax.training.optimizers.adam import skippable

BETA = 0.95
"""Of the momentum. `optax` has the same."""
COEFFICIENTS, EPS = (3.4445, -4.7750, 2.0315), 1e-8
"""Of Newton-Schulz, as Jordan et al. and `optax` have them."""
LARGEST_STACK = 2**22
"""Most numbers in a stack of several arrays. It bounds the memory of the copy."""


def scale_by_muon(narrow: bool = False, stacked: bool = False) -> optax.GradientTransformationExtraArgs:
    """The orthogonalised Nesterov momentum of each matrix, in the dtype of its gradient.

    With `narrow` the Newton-Schulz steps are computed in bfloat16, as Jordan et al. do. They need no more: they bring
    every singular value near 1, whatever it was before. The momentum stays as it is.

    With `stacked` all matrices of one shape, or of its transpose, are one stack, up to `LARGEST_STACK` numbers. On a
    CPU, one bfloat16 product of many small matrices is faster than several of few. In float32 it is not.

    The state is that of `optax`, so that saved runs resume. Its `ns_coeffs` are not read.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, contrib.MuonState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: BETA * m + (1 - BETA) * g, state.mu, updates)

        def ahead(m: Array, g: Array) -> Array:
            """Nesterov's momentum, in which both parts have a correction for the zeros that they began with."""
            seen, now = 1 - BETA ** (count + 1), 1 - BETA**count
            momentum = BETA * m / seen + (1 - BETA) * g / now
            return momentum.astype(jnp.bfloat16) if narrow else momentum

        momentum, tree = jax.tree.flatten(jax.tree.map(ahead, mu, updates))
        directions = _in_stacks(momentum) if stacked else [orthogonalised(m) for m in momentum]
        directions = jax.tree.map(lambda d, g: d.astype(g.dtype), jax.tree.unflatten(tree, directions), updates)
        return directions, contrib.MuonState(count, mu, state.ns_coeffs)

    return skippable(optax.GradientTransformation(contrib.scale_by_muon().init, update))


def orthogonalised(x: Float[Array, "*E m n"]) -> Float[Array, "*E m n"]:
    """About U V^T of each matrix U S V^T: X <- a X + (b S + c S S) X with S = X X^T, five times, after a division by
    the norm. Every singular value ends near 1.

    S is written as an equation over pairs of rows. In bfloat16, XLA's product of `x @ x.mT` takes 4.5 times as long on
    a CPU.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT).mT
    a, b, c = COEFFICIENTS
    precision = dot_precision(x.dtype)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = jnp.einsum("...ik,...jk->...ij", x, x, precision=precision)
        x = a * x + jnp.matmul(b * s + jnp.matmul(c * s, s, precision=precision), x, precision=precision)
    return x


def _in_stacks(arrays: list[Array]) -> list[Array]:
    """`orthogonalised` of each array, computed on stacks of them."""
    results = list(arrays)
    for group in _groups(arrays):
        stack = orthogonalised(_stack([arrays[i] for i in group]))
        for i, array in zip(group, _unstack(stack, [arrays[i] for i in group]), strict=True):
            results[i] = array
    return results


def _groups(arrays: list[Array]) -> list[list[int]]:
    """The places of the arrays whose matrices have the same two sides, at most `LARGEST_STACK` numbers in a group
    unless a single array has more."""
    groups: defaultdict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for i, array in enumerate(arrays):
        same = groups[tuple(sorted(array.shape[-2:]))]
        if not same or sum(arrays[j].size for j in same[-1]) + array.size > LARGEST_STACK:
            same.append([])
        same[-1].append(i)
    return [group for same in groups.values() for group in same]


def _stack(arrays: list[Array]) -> Float[Array, "N m n"]:
    """The matrices of all arrays, those with more rows than columns transposed."""
    matrices = [array.reshape(-1, *array.shape[-2:]) for array in arrays]
    return jnp.concatenate([m.swapaxes(1, 2) if m.shape[1] > m.shape[2] else m for m in matrices])


def _unstack(stack: Float[Array, "N m n"], like: list[Array]) -> list[Array]:
    """The arrays of a stack, each in its own shape."""
    results, first = [], 0
    for array in like:
        count = array.size // stack[0].size
        matrices = stack[first : first + count]
        upright = array.shape[-2] > array.shape[-1]
        results.append((matrices.swapaxes(1, 2) if upright else matrices).reshape(array.shape))
        first += count
    return results

"""Muon (Jordan et al. 2024): the momentum of each matrix, made nearly orthogonal by five Newton-Schulz steps.

A stack of experts `[E, D, F]` is treated as E matrices. If it were orthogonalised as one matrix, the experts would
share one spectrum.

`optax.contrib.muon` also multiplies the step of a matrix `[in, out]` by sqrt(max(1, out / in)): 1.732 for the `[D, 3D]`
matrix of queries, keys and values. This Muon does not. All its matrices move by about `muon_lr` in spectral norm, and
the presets are tuned for that.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax import contrib

from moe_jax.training.optimizers.adam import skippable

BETA = 0.95
"""Of the momentum. `optax` has the same."""


def scale_by_muon(narrow: bool = False) -> optax.GradientTransformationExtraArgs:
    """The orthogonalised Nesterov momentum of each matrix, in the dtype of its gradient.

    With `narrow` the Newton-Schulz steps are computed in bfloat16, as Jordan et al. do. They need no more: they bring
    every singular value near 1, whatever it was before. The momentum stays as it is.
    """
    orthogonal = partial(contrib.scale_by_muon, weight_dimension_numbers=_axes)
    if not narrow:
        return skippable(orthogonal(beta=BETA))
    without_momentum = orthogonal(beta=0.0, nesterov=False)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, contrib.MuonState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: BETA * m + (1 - BETA) * g, state.mu, updates)

        def ahead(m: Array, g: Array) -> Array:
            """Nesterov's momentum, in which both parts have a correction for the zeros that they began with."""
            seen, now = 1 - BETA ** (count + 1), 1 - BETA**count
            return (BETA * m / seen + (1 - BETA) * g / now).astype(jnp.bfloat16)

        momentum = jax.tree.map(ahead, mu, updates)
        directions, _ = without_momentum.update(momentum, without_momentum.init(momentum))
        directions = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, updates)
        return directions, contrib.MuonState(count, mu, state.ns_coeffs)

    return skippable(optax.GradientTransformation(orthogonal(beta=BETA).init, update))


def _axes(params: Any) -> Any:
    """The last two axes of each array are those of its matrices."""
    return jax.tree.map(lambda p: contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)

"""The way of rows to the devices of their experts, and back. For use inside `shard_map` over the axis `expert`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Shaped

AXIS = "expert"


def sent(rows: Shaped[Array, "E R *D"]) -> Shaped[Array, "G S *D"]:
    """The rows of all n devices for the groups of this device, with the rows of the devices side by side: G = E / n
    groups of S = n * R rows. Device j has the groups j*E/n to (j+1)*E/n - 1."""
    return jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)


def exchange(experts: Callable[[Array], Array], rows: Float[Array, "E R D"]) -> Float[Array, "E R D"]:
    """The experts' outputs for the rows of this device, in the order of the rows. `experts` are those of this device,
    a function of the rows that arrive."""
    return jax.lax.all_to_all(experts(sent(rows)), AXIS, split_axis=1, concat_axis=0, tiled=True)

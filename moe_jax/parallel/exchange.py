"""The way of rows to the devices of their experts, and back. For use inside `shard_map` over the axis `expert`.

Chapter 19 of `foundation` derives their gradients.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Shaped

AXIS = "expert"


def sent(rows: Shaped[Array, "E R *D"]) -> Shaped[Array, "G S *D"]:
    """The rows of all n devices for the groups of this device, with the rows of the devices side by side: G = E / n
    groups of S = n * R rows. Device j has the groups j*E/n to (j+1)*E/n - 1."""
    return jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)


def exchange(
    experts: Callable[[Array, Array], Array], rows: Float[Array, "E R D"], gate: Float[Array, "E R"]
) -> Float[Array, "E R D"]:
    """The experts' outputs for the rows of this device, times their gates, in the order of the rows. `experts` are
    those of this device, a function of the rows and gates that arrive.

    The gates travel with the rows, because they enter before the last product (`Experts.__call__`). Multiplying the
    results here would round them in another way than one device does.
    """
    return jax.lax.all_to_all(experts(sent(rows), sent(gate)), AXIS, split_axis=1, concat_axis=0, tiled=True)

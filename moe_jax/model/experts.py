"""What one expert computes: a feed-forward network without biases, over groups of rows."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.config import Activation
from moe_jax.model.layers import matrix_init
from moe_jax.model.products import product, row_product


class Experts(nnx.Module):
    """E feed-forward networks side by side.

    gelu:   gelu(x w_in) w_out, in the tanh form (Hendrycks and Gimpel 2016, section 2)
    swiglu: (silu(x w_gate) * (x w_in)) w_out (Shazeer 2020, equation 6)

    Parameters: w_in, w_gate (swiglu) `[E, D, F]`, w_out `[E, F, D]`.
    """

    def __init__(
        self, experts: int, width: int, hidden: int, activation: Activation, out_scale: float, rngs: nnx.Rngs
    ) -> None:
        self.activation = activation
        self.w_in = nnx.Param(matrix_init(rngs, (experts, width, hidden)))
        if activation == "swiglu":
            self.w_gate = nnx.Param(matrix_init(rngs, (experts, width, hidden)))
        self.w_out = nnx.Param(matrix_init(rngs, (experts, hidden, width), scale=out_scale))

    def __call__(
        self, rows: Float[Array, "G R D"], group_expert: Int[Array, " G"] | None = None
    ) -> Float[Array, "G R D"]:
        """Each group of rows through the network of its expert: group g's is `group_expert[g]`, or g itself."""

        def weight(param: nnx.Param) -> Array:
            return param[...] if group_expert is None else param[...][group_expert]

        # What follows the first products is recomputed in the backward pass. Autodiff would keep the activation, and
        # several results on the way to it, each as large as the hidden rows: most of what a layer keeps.
        @jax.checkpoint
        def rest(hidden: list[Array], w_out: Array) -> Array:
            return _product(self._active(hidden), w_out)

        return rest([_product(rows, weight(w)) for w in self._first()], weight(self.w_out))

    def in_blocks(
        self, rows: Float[Array, "G R D"], group_expert: Int[Array, " G"], used: Int[Array, ""]
    ) -> Float[Array, "G R D"]:
        """The same for groups as `dispatch.plan_blocks` lays them: the first E side by side, where no expert's matrices
        have to be moved, and of the others one after another those that hold tokens, up to `used` groups in all. For
        passes without a gradient, since the number of turns is not known beforehand. Groups beyond `used` are zero.
        """
        experts = len(self.w_in[...])
        y = self(rows[:experts])
        if len(rows) == experts:
            return y

        def turn(g: Array, y: Array) -> Array:
            return y.at[g].set(self._one(rows[g], group_expert[g]))

        return jax.lax.fori_loop(experts, used, turn, jnp.concatenate([y, jnp.zeros_like(rows[experts:])]))

    def in_turn(self, rows: Float[Array, "G D"], group_expert: Int[Array, " G"]) -> Float[Array, "G D"]:
        """The same for groups of one row, one after the other. For few tokens, which wait for the reading of weights:
        indexing the weights of all groups first would write them, and read them once more."""
        return jax.lax.map(lambda group: self._one(*group), (rows, group_expert))

    def _one(self, x: Float[Array, "*R D"], expert: Int[Array, ""]) -> Float[Array, "*R D"]:
        """The network of one expert. (Its gradient would be added into all experts' matrices.)"""

        def product(x: Array, param: nnx.Param) -> Array:
            if x.ndim == 1:
                return row_product(x, param[...], expert)
            return x @ jax.lax.dynamic_index_in_dim(param[...], expert, keepdims=False).astype(x.dtype)

        return product(self._active([product(x, w) for w in self._first()]), self.w_out)

    def _first(self) -> list[nnx.Param]:
        return [self.w_in, self.w_gate] if self.activation == "swiglu" else [self.w_in]

    def _active(self, hidden: list[Array]) -> Array:
        """What the last product is taken of, from the first products."""
        if self.activation == "swiglu":
            return jax.nn.silu(hidden[1]) * hidden[0]
        return jax.nn.gelu(hidden[0], approximate=True)


def _product(rows: Array, weights: Array) -> Array:
    """The batched product. A single group is multiplied as a plain matrix: the compiler would do the same, and forget
    on the way which part of the model the product came from."""
    return product(rows[0], weights[0])[None] if len(weights) == 1 else product(rows, weights)

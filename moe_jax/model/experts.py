"""What one expert computes: a feed-forward network without biases, over groups of rows."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.config import Activation
from moe_jax.model.layers import matrix_init
from moe_jax.model.products import product


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
            gated = self.activation == "swiglu"
            active = jax.nn.silu(hidden[1]) * hidden[0] if gated else jax.nn.gelu(hidden[0], approximate=True)
            return _product(active, w_out)

        first = [self.w_in, self.w_gate] if self.activation == "swiglu" else [self.w_in]
        return rest([_product(rows, weight(w)) for w in first], weight(self.w_out))

    def in_turn(self, rows: Float[Array, "G R D"], group_expert: Int[Array, " G"]) -> Float[Array, "G R D"]:
        """The same, one group after the other, with each expert's matrices where they lie. For passes without a
        gradient: what they wait for is the reading of weights, and indexing the weights of all groups first would
        write them and read them once more. (Its gradient would be added into all experts' matrices, group by group.)
        """

        def one(carry: None, group: tuple[Array, Array]) -> tuple[None, Array]:
            x, e = group

            def product(x: Array, param: nnx.Param) -> Array:
                return x @ jax.lax.dynamic_index_in_dim(param[...], e, keepdims=False).astype(x.dtype)

            hidden = product(x, self.w_in)
            if self.activation == "swiglu":
                active = jax.nn.silu(product(x, self.w_gate)) * hidden
            else:
                active = jax.nn.gelu(hidden, approximate=True)
            return carry, product(active, self.w_out)

        return jax.lax.scan(one, None, (rows, group_expert))[1]


def _product(rows: Array, weights: Array) -> Array:
    """The batched product. A single group is multiplied as a plain matrix: the compiler would do the same, and forget
    on the way which part of the model the product came from."""
    return product(rows[0], weights[0])[None] if len(weights) == 1 else product(rows, weights)

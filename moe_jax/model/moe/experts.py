"""The experts: feed-forward networks without biases, applied to groups of rows."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import Activation
from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from moe_jax.model.kernels.processor import by_platform, rounded_once
from moe_jax.model.kernels.quantized import quantized_vectors_matmul, vector_product
from moe_jax.model.layers import matrix_init
from moe_jax.model.low_rank import LowRank
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.model.quantized import QuantizedMatrix, as_array


class Experts(nnx.Module):
    """E feed-forward networks side by side.

    gelu:   gelu(x w_in) w_out, in the tanh form (Hendrycks and Gimpel 2016, section 2). It differs from the exact form,
            with erf, by at most 4.8e-4. The PyTorch project that `seed-158m` is named after takes the exact form.
    swiglu: (silu(x w_gate) * (x w_in)) w_out (Shazeer 2020, equation 6)

    Parameters: w_in, w_gate (swiglu) `[E, D, F]`, w_out `[E, F, D]`.
    """

    w_in_lora: LowRank | None = None
    w_gate_lora: LowRank | None = None
    w_out_lora: LowRank | None = None
    """Adapters of the matrices (`low_rank.py` of `model/`), in training only. A model that writes has them merged."""

    def __init__(
        self, experts: int, width: int, hidden: int, activation: Activation, out_scale: float, rngs: nnx.Rngs
    ) -> None:
        self.activation = activation
        self.w_in = nnx.Param(matrix_init(rngs, (experts, width, hidden)))
        if activation == "swiglu":
            self.w_gate = nnx.Param(matrix_init(rngs, (experts, width, hidden)))
        self.w_out = nnx.Param(matrix_init(rngs, (experts, hidden, width), scale=out_scale))

    def __call__(
        self,
        rows: Float[Array, "G R D"],
        further_expert: Int[Array, " further"] | None = None,
        gate: Float[Array, "G R"] | None = None,
    ) -> Float[Array, "G R D"]:
        """The network of expert g on the rows of each group g < E, and of expert `further_expert[g - E]` on the rows of
        the others. With a `gate`, each row's output is multiplied with it.

        The gate enters before the last product, g f(h) w_out = (g f(h)) w_out, so the gradient of a gate needs f(h) and
        not the output. With remat the backward pass then recomputes one product less (Guo et al. 2025, "SonicMoE",
        section 3.2).
        """

        # Everything after the first products is recomputed in the backward pass. Otherwise autodiff keeps the
        # activation and several intermediate results, each as large as the hidden rows. They would be most of the
        # memory that a layer keeps.
        @jax.checkpoint
        def rest(
            hidden: list[Array], w_out: Array | QuantizedMatrix, adapter: LowRank | None, gate: Array | None
        ) -> Array:
            inner = self._activate(hidden, gate)
            return _add(grouped_matmul(inner, w_out, further_expert), adapter, inner, further_expert)

        hidden = [
            _add(grouped_matmul(rows, w[...], further_expert), adapter, rows, further_expert)
            for w, adapter in zip(self._input_matrices(), (self.w_in_lora, self.w_gate_lora), strict=False)
        ]
        return rest(hidden, self.w_out[...], self.w_out_lora, gate)

    def apply_blocks(
        self, rows: Float[Array, "G R D"], further_expert: Int[Array, " further"], used: Int[Array, ""]
    ) -> Float[Array, "G R D"]:
        """The same for the groups of `dispatch.Blocks`, without a gradient. Groups from `used` on hold zeros.

        On a CPU no weights are copied: the first E groups are one batched product with the matrices of all experts in
        place, and the other used groups, E to `used` - 1, follow one after another. A card would wait for the host at
        each turn, so it multiplies all groups at once.
        """
        experts = self.w_in[...].shape[0]
        if len(rows) == experts:
            return self(rows)

        def in_turn(rows: Array, further_expert: Array, used: Array) -> Array:
            def add_block(g: Array, y: Array) -> Array:
                return y.at[g].set(self.apply_single_expert(rows[g], further_expert[g - experts]))

            y = jnp.concatenate([self(rows[:experts]), jnp.zeros_like(rows[experts:])])
            return jax.lax.fori_loop(experts, used, add_block, y)

        def at_once(rows: Array, further_expert: Array, used: Array) -> Array:
            return self(rows, further_expert)

        return by_platform(rows, further_expert, used, cpu=in_turn, default=at_once)

    def apply_per_token(
        self, rows: Float[Array, "G D"], group_expert: Int[Array, " G"], wanted: Bool[Array, " G"] | None = None
    ) -> Float[Array, "G D"]:
        """The same for groups of one row. Rows that are not `wanted` may be left out, and mean nothing then.

        Decoding is bound by reading weights. Gathering them first would write and read them once more. So on a CPU one
        group after another multiplies with its expert's matrices in place; those of 4 bits, whose conversion is worth
        several cores, side by side. On a GPU, where each turn would be several launches, all groups multiply at once
        (`_rows_at_once`).
        """

        def on_cpu(rows: Array, group_expert: Array) -> Array:
            w_out = self.w_out[...]
            if wanted is None and isinstance(w_out, QuantizedMatrix) and w_out.bits == 4:
                hidden = [quantized_vectors_matmul(rows, w[...], group_expert) for w in self._input_matrices()]  # pyright: ignore[reportArgumentType]
                return quantized_vectors_matmul(self._activate(hidden), w_out, group_expert)
            if wanted is None:
                return jax.lax.map(lambda group: self.apply_single_expert(*group), (rows, group_expert))
            first = jnp.argsort(~wanted)  # the rows that are wanted come first

            def one(n: Int[Array, ""], y: Array) -> Array:
                g = first[n]
                return y.at[g].set(self.apply_single_expert(rows[g], group_expert[g]))

            return jax.lax.fori_loop(0, wanted.sum(), one, jnp.zeros_like(rows))

        return by_platform(rows, group_expert, cpu=on_cpu, default=self._rows_at_once)

    def _rows_at_once(self, rows: Float[Array, "G D"], group_expert: Int[Array, " G"]) -> Float[Array, "G D"]:
        """Each product is one multiplication and one sum, so that XLA fuses the gather of the matrices into them and
        writes no copy. Summed in at least float32."""
        wide = at_least_float32(rows.dtype)

        def matmul(x: Array, param: nnx.Param) -> Array:
            matrices = as_array(jax.tree.map(lambda w: w[group_expert], param[...]), x.dtype)
            return (x.astype(wide)[:, :, None] * matrices.astype(wide)).sum(1).astype(x.dtype)

        return matmul(self._activate([matmul(rows, w) for w in self._input_matrices()]), self.w_out)

    def apply_single_expert(self, x: Float[Array, "*R D"], expert: Int[Array, ""]) -> Float[Array, "*R D"]:
        """The network of one expert. Not for training: its gradient would be as large as all experts together."""

        assert self.w_in_lora is None, "adapters are for training; merge them"

        def matmul(x: Array, param: nnx.Param) -> Array:
            if x.ndim == 1:
                return vector_product(x, param[...], expert)
            chosen = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), param[...])
            return jnp.matmul(x, as_array(chosen, x.dtype), precision=dot_precision(x.dtype))

        return matmul(self._activate([matmul(x, w) for w in self._input_matrices()]), self.w_out)

    def _input_matrices(self) -> list[nnx.Param]:
        return [self.w_in, self.w_gate] if self.activation == "swiglu" else [self.w_in]

    def _activate(self, hidden: list[Array], gate: Array | None = None) -> Array:
        """The input of the last product, from the first products. With a `gate`, each row is multiplied with it."""
        function = partial(_activated, _swiglu if self.activation == "swiglu" else _gelu)
        return function(gate, *hidden) if hidden[0].dtype.itemsize >= 4 else rounded_once(function, gate, *hidden)


def _swiglu(hidden: Array, gate: Array) -> Array:
    return jax.nn.silu(gate) * hidden


def _gelu(hidden: Array) -> Array:
    return jax.nn.gelu(hidden, approximate=True)


def _activated(function: Callable[..., Array], gate: Array | None, *hidden: Array) -> Array:
    return function(*hidden) if gate is None else gated(function(*hidden), gate)


def _add(y: Array, adapter: LowRank | None, rows: Array, further_expert: Array | None) -> Array:
    """A product, with what its matrix's adapter adds to it."""
    return y if adapter is None else y + adapter.grouped(rows, further_expert)


def gated(rows: Float[Array, "*G D"], gate: Float[Array, "*G"]) -> Float[Array, "*G D"]:
    """Each row times its gate, in the dtype of the rows. The product is rounded once, and the gradient of a gate is a
    sum in at least float32: it is all that the router learns from the loss."""
    wide = at_least_float32(rows.dtype)
    return (rows.astype(wide) * gate.astype(wide)[..., None]).astype(rows.dtype)

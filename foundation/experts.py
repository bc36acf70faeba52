"""The experts: E small feed-forward networks side by side, each on its own slots. Derived in chapters 7 and 8.

    GELU:    y = gelu(x W_in) W_out
    SwiGLU:  y = (silu(x W_gate) * (x W_in)) W_out

An einsum with the letter e on both sides is one matrix product per expert. There are no biases, so that an empty slot,
x = 0, gives y = 0 and leaves no gradient in any weight.

Sources: Shazeer et al. 2017, section 2; Shazeer 2020, equations 5 and 6; Hendrycks and Gimpel 2016 (GELU).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from foundation.activations import gelu_backward, gelu_forward, silu_backward, silu_forward

Slots = Float[Array, "B E C D"]


def gelu_experts_forward(x: Slots, w_in: Float[Array, "E D F"], w_out: Float[Array, "E F D"]) -> tuple[Slots, tuple]:
    """y_e = gelu(x_e W_in,e) W_out,e for each expert e, GELU in its tanh form."""
    u = jnp.einsum("becd,edf->becf", x, w_in)
    hidden, gelu_cache = gelu_forward(u)
    return jnp.einsum("becf,efd->becd", hidden, w_out), (x, w_in, w_out, hidden, gelu_cache)


def gelu_experts_backward(d_y: Slots, cache: tuple) -> tuple[Slots, Float[Array, "E D F"], Float[Array, "E F D"]]:
    """(d_x, d_w_in, d_w_out)."""
    x, w_in, w_out, hidden, gelu_cache = cache
    d_hidden = jnp.einsum("becd,efd->becf", d_y, w_out)
    d_w_out = jnp.einsum("becf,becd->efd", hidden, d_y)
    d_u = gelu_backward(d_hidden, gelu_cache)
    d_x = jnp.einsum("becf,edf->becd", d_u, w_in)
    d_w_in = jnp.einsum("becd,becf->edf", x, d_u)
    return d_x, d_w_in, d_w_out


def swiglu_experts_forward(
    x: Slots, w_gate: Float[Array, "E D F"], w_in: Float[Array, "E D F"], w_out: Float[Array, "E F D"]
) -> tuple[Slots, tuple]:
    """y_e = (silu(x_e W_gate,e) * (x_e W_in,e)) W_out,e for each expert e."""
    opened, silu_cache = silu_forward(jnp.einsum("becd,edf->becf", x, w_gate))
    u = jnp.einsum("becd,edf->becf", x, w_in)
    y = jnp.einsum("becf,efd->becd", opened * u, w_out)
    return y, (x, w_gate, w_in, w_out, opened, u, silu_cache)


def swiglu_experts_backward(
    d_y: Slots, cache: tuple
) -> tuple[Slots, Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """(d_x, d_w_gate, d_w_in, d_w_out)."""
    x, w_gate, w_in, w_out, opened, u, silu_cache = cache
    d_hidden = jnp.einsum("becd,efd->becf", d_y, w_out)
    d_w_out = jnp.einsum("becf,becd->efd", opened * u, d_y)
    d_gate = silu_backward(d_hidden * u, silu_cache)
    d_u = d_hidden * opened
    d_w_gate = jnp.einsum("becd,becf->edf", x, d_gate)
    d_w_in = jnp.einsum("becd,becf->edf", x, d_u)
    d_x = jnp.einsum("becf,edf->becd", d_gate, w_gate) + jnp.einsum("becf,edf->becd", d_u, w_in)
    return d_x, d_w_gate, d_w_in, d_w_out

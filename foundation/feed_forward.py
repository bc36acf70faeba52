"""The feed-forward network of a dense block: SwiGLU. Derived in chapter 7.

    a = x W_gate        u = x W_in        h = silu(a) * u        y = h W_out

`experts.py` is this network, E times side by side.

Source: Shazeer 2020, equations 5 and 6.
"""

from jaxtyping import Array, Float

from foundation.activations import silu_backward, silu_forward
from foundation.linear import linear_backward, linear_forward

Stream = Float[Array, "*rows D"]
Into = Float[Array, "D F"]
OutOf = Float[Array, "F D"]


def feed_forward_forward(x: Stream, w_gate: Into, w_in: Into, w_out: OutOf) -> tuple[Stream, tuple]:
    """y = (silu(x W_gate) * (x W_in)) W_out."""
    a, gate_cache = linear_forward(x, w_gate)
    opened, silu_cache = silu_forward(a)
    u, in_cache = linear_forward(x, w_in)
    y, out_cache = linear_forward(opened * u, w_out)
    return y, (gate_cache, silu_cache, in_cache, out_cache, opened, u)


def feed_forward_backward(d_y: Stream, cache: tuple) -> tuple[Stream, Into, Into, OutOf]:
    """(d_x, d_w_gate, d_w_in, d_w_out)."""
    gate_cache, silu_cache, in_cache, out_cache, opened, u = cache
    d_h, d_w_out, _ = linear_backward(d_y, out_cache)
    d_a = silu_backward(d_h * u, silu_cache)
    d_x_gate, d_w_gate, _ = linear_backward(d_a, gate_cache)
    d_x_in, d_w_in, _ = linear_backward(d_h * opened, in_cache)
    return d_x_gate + d_x_in, d_w_gate, d_w_in, d_w_out

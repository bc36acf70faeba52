"""The affine map y = x W + b. Derived in chapter 2.

    y_ro = sum_i x_ri W_io + b_o      d_x = d_y W^T      d_W = x^T d_y      d_b = sum of d_y over the rows

Nothing is divided by the number of rows: if a loss is a mean, its own backward pass has put 1/rows into d_y.

Source: Rumelhart, Hinton and Williams 1986, equations 4 to 6.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear_forward(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> tuple[Float[Array, "*rows O"], tuple]:
    """y = x W + b, for any number of leading axes; without `bias`, y = x W."""
    y = x @ kernel
    if bias is not None:
        y = y + bias
    return y, (x, kernel, bias is not None)


def linear_backward(
    d_y: Float[Array, "*rows O"], cache: tuple
) -> tuple[Float[Array, "*rows I"], Float[Array, "I O"], Float[Array, " O"] | None]:
    """(d_x, d_kernel, d_bias); d_bias is None where the forward pass had no bias."""
    x, kernel, has_bias = cache
    d_x = d_y @ kernel.T
    # Leading axes only say which row; the sum over r runs over all of them.
    rows_x = x.reshape(-1, x.shape[-1])  # [*rows, I] -> [R, I]
    rows_d = d_y.reshape(-1, d_y.shape[-1])  # [*rows, O] -> [R, O]
    d_kernel = rows_x.T @ rows_d
    d_bias = jnp.sum(rows_d, axis=0) if has_bias else None
    return d_x, d_kernel, d_bias

"""The affine map y = x W + b, and why its gradients are two transposed products.

Write out one entry, y_ro = sum_i x_ri W_io + b_o, for row r. Then

    dL/dx_ri = sum_o dL/dy_ro W_io     so  d_x = d_y W^T
    dL/dW_io = sum_r x_ri dL/dy_ro     so  d_W = x^T d_y
    dL/db_o  = sum_r dL/dy_ro          so  d_b = column sums of d_y

The shapes leave no other choice, which is a good way to remember them. Note what is *not* there: no
division by the number of rows. Where a loss is a mean, its own backward pass has already put 1/rows into
d_y; dividing again is the commonest bug of hand-written back-propagation (chapter 2 shows how the check
catches it).

Source: Rumelhart, Hinton and Williams 1986, equations 4 to 6.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear_forward(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> tuple[Float[Array, "*rows O"], tuple]:
    """y = x W + b, for any number of leading axes; without `bias`, y = x W.

    The cache holds the input and the kernel: both are needed, and neither can be had from the output.
    """
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

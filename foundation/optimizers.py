"""What turns a gradient into a step: Adam, AdamW, Muon. Chapter 10 asks where these steps come from.

Each is `NAME_init(params) -> state` and `NAME_update(grads, state, params, ...) -> (params, state)`, on any tree of
arrays. Adafactor is in `adafactor.py`.

Sources: Adam: Kingma and Ba 2015, algorithm 1. AdamW: Loshchilov and Hutter 2019, algorithm 2. Muon: Jordan et al. 2024
("Muon: an optimizer for hidden layers in neural networks").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Params = PyTree[Float[Array, "..."]]

# The quintic of Jordan et al.: chosen for a steep slope at 0, so that five steps lift even small singular
# values to within about [0.7, 1.2]. It does not converge to 1, and does not need to.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def adam_init(params: Params) -> tuple:
    """(step, mean, square): steps taken, and the running means of g (first moment) and g^2 (second)."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jnp.zeros((), int), zeros, zeros


def adam_update(
    grads: Params,
    state: tuple,
    params: Params,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Params, tuple]:
    """m <- beta1 m + (1 - beta1) g;  s <- beta2 s + (1 - beta2) g^2;  w <- w - lr (m' / (sqrt(s') + eps) + wd w).

    m' = m / (1 - beta1^t) undoes the start at zero. With `weight_decay` this is AdamW: the decay is added after the
    division, so that it is not rescaled by the gradient's size as an L2 term in the loss would be.
    """
    step, mean, square = state
    step = step + 1
    mean = jax.tree.map(lambda m, g: beta1 * m + (1.0 - beta1) * g, mean, grads)
    square = jax.tree.map(lambda s, g: beta2 * s + (1.0 - beta2) * g**2, square, grads)
    correct1, correct2 = 1.0 - beta1**step, 1.0 - beta2**step

    def moved(w: Array, m: Array, s: Array) -> Array:
        direction = (m / correct1) / (jnp.sqrt(s / correct2) + eps)
        return w - lr * (direction + weight_decay * w)

    return jax.tree.map(moved, params, mean, square), (step, mean, square)


def muon_init(params: Params) -> tuple:
    """(step, mean): steps taken, and the running mean of the gradient."""
    return jnp.zeros((), int), jax.tree.map(jnp.zeros_like, params)


def muon_update(
    grads: Params, state: tuple, params: Params, lr: float, beta: float = 0.95, weight_decay: float = 0.0
) -> tuple[Params, tuple]:
    """Muon for matrices [I, O]: the Nesterov momentum, made nearly orthogonal, scaled by sqrt(max(1, O / I)).

    Only for matrices that map one hidden space into another; embeddings, the head, norms and biases take Adam. The
    momentum is a bias-corrected running mean, and Nesterov looks one step ahead: d = beta m_(t+1)' + (1 - beta) g'.
    """
    step, mean = state
    step = step + 1
    mean = jax.tree.map(lambda m, g: beta * m + (1.0 - beta) * g, mean, grads)
    correct_now, correct_next = 1.0 - beta**step, 1.0 - beta ** (step + 1)

    def moved(w: Array, m: Array, g: Array) -> Array:
        ahead = beta * m / correct_next + (1.0 - beta) * g / correct_now
        scale = max(1.0, w.shape[-1] / w.shape[0]) ** 0.5
        return w - lr * (scale * orthogonalize(ahead) + weight_decay * w)

    return jax.tree.map(moved, params, mean, grads), (step, mean)


def orthogonalize(
    matrix: Float[Array, "I O"], steps: int = NEWTON_SCHULZ_STEPS, eps: float = 1e-8
) -> Float[Array, "I O"]:
    """About U V^T of matrix = U S V^T, by Newton-Schulz: X <- a X + b (X X^T) X + c (X X^T)^2 X.

    One step changes each singular value alone, s <- a s + b s^3 + c s^5. The Frobenius norm is at least the largest of
    them, so dividing by it starts all in [0, 1].
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # the smaller Gram matrix
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x

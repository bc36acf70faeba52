"""`python -m foundation.backprop_from_scratch [--picture FILE]`: a two-layer net learns XOR, every step
shown.

XOR is 1 where exactly one of two inputs is 1. No line separates its ones from its zeros, so no single layer
can compute it; two layers can, once the first has moved the points. Minsky and Papert 1969 showed the
first, Rumelhart, Hinton and Williams 1986 (their section "The exclusive-or problem") the second.

The lesson also plants the commonest bug, dividing the weight gradient by the batch size although the loss
has done so, and shows what the check says to it. That bug still learns, slowly: a falling loss is no proof
of a gradient.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from foundation.activations import sigmoid_backward, sigmoid_forward, tanh_backward, tanh_forward
from foundation.initializers import xavier_uniform
from foundation.linear import linear_backward, linear_forward
from foundation.losses import mse_backward, mse_forward
from foundation.optimizers import momentum_init, momentum_update
from foundation.parity import Check, run

INPUTS = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGETS = np.array([[0.0], [1.0], [1.0], [0.0]])
HIDDEN = 4
STEPS = 400
LEARNING_RATE = 0.5

Scalar = Float[Array, ""]


def init_params(key: Array) -> dict[str, Array]:
    """Two affine layers: 2 -> HIDDEN -> 1."""
    key1, key2 = jax.random.split(key)
    return {
        "w1": xavier_uniform(key1, (2, HIDDEN)),
        "b1": jnp.zeros(HIDDEN),
        "w2": xavier_uniform(key2, (HIDDEN, 1)),
        "b2": jnp.zeros(1),
    }


def net_forward(params: dict[str, Array], x: Float[Array, "B 2"]) -> tuple[Float[Array, "B 1"], tuple]:
    """y = sigmoid(tanh(x W1 + b1) W2 + b2)."""
    a, cache1 = linear_forward(x, params["w1"], params["b1"])
    h, cache2 = tanh_forward(a)
    b, cache3 = linear_forward(h, params["w2"], params["b2"])
    y, cache4 = sigmoid_forward(b)
    return y, (cache1, cache2, cache3, cache4)


def net_backward(d_y: Float[Array, "B 1"], cache: tuple) -> dict[str, Array]:
    """The four lines of `net_forward` from the last to the first, each replaced by its backward pass."""
    cache1, cache2, cache3, cache4 = cache
    d_b = sigmoid_backward(d_y, cache4)
    d_h, d_w2, d_b2 = linear_backward(d_b, cache3)
    d_a = tanh_backward(d_h, cache2)
    _, d_w1, d_b1 = linear_backward(d_a, cache1)
    return {"w1": d_w1, "b1": d_b1, "w2": d_w2, "b2": d_b2}  # pyright: ignore[reportReturnType]


def loss_forward(params: dict[str, Array]) -> tuple[Scalar, tuple]:
    """Mean squared error over the four points."""
    y, net_cache = net_forward(params, jnp.asarray(INPUTS, params["w1"].dtype))
    loss, loss_cache = mse_forward(y, jnp.asarray(TARGETS, y.dtype))
    return loss, (net_cache, loss_cache)


def loss_backward(d_loss: Scalar, cache: tuple) -> dict[str, Array]:
    """The gradient of the loss in every parameter."""
    net_cache, loss_cache = cache
    d_y, _ = mse_backward(d_loss, loss_cache)  # this has the 1 / batch
    return net_backward(d_y, net_cache)


def loss_backward_dividing_twice(d_loss: Scalar, cache: tuple) -> dict[str, Array]:
    """The bug: dW = x^T d_y / batch, "because the gradient is a mean". d_y is divided already."""
    right = loss_backward(d_loss, cache)
    return {name: grad / len(INPUTS) if name.startswith("w") else grad for name, grad in right.items()}


class Training(NamedTuple):
    """Final parameters, and the loss before each step."""

    params: dict[str, Array]
    losses: list[float]


def train(backward: Callable[[Any, tuple], dict[str, Array]] = loss_backward, seed: int = 0) -> Training:
    """STEPS steps of gradient descent with momentum on all four points."""
    params = init_params(jax.random.key(seed))
    velocity = momentum_init(params)
    curve = []

    @jax.jit
    def step(params: dict, velocity: dict) -> tuple[dict, dict, Array]:
        loss, cache = loss_forward(params)
        params, velocity = momentum_update(backward(jnp.ones_like(loss), cache), velocity, params, LEARNING_RATE)
        return params, velocity, loss

    for _ in range(STEPS):
        params, velocity, loss = step(params, velocity)
        curve.append(float(loss))
    return Training(params, curve)


def correct(params: dict[str, Array]) -> int:
    """How many of the four points are on the right side of 1/2."""
    y, _ = net_forward(params, jnp.asarray(INPUTS, params["w1"].dtype))
    return int(jnp.sum((y > 0.5) == (TARGETS > 0.5)))


def boundary(params: dict[str, Array], size: int = 41) -> Float[Array, "size size"]:
    """The net's output on the square [-1/2, 3/2]^2, the first axis running down from the top."""
    line = jnp.linspace(-0.5, 1.5, size)
    x1, x2 = jnp.meshgrid(line, line[::-1])
    y, _ = net_forward(params, jnp.stack([x1.ravel(), x2.ravel()], axis=-1))
    return y.reshape(size, size)


def draw(training: Training, twice: Training, path: Path) -> None:
    """Loss curves and decision boundary, side by side."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    left.semilogy(training.losses, color="#1f5fa8", label="right gradient")
    left.semilogy(twice.losses, color="#c8553d", label="weights' gradient divided by the batch twice")
    left.set(xlabel="step", ylabel="mean squared error", title="Both fall: a falling loss proves nothing")
    left.legend(frameon=False, loc="upper right")
    image = right.imshow(boundary(training.params, 201), extent=(-0.5, 1.5, -0.5, 1.5), cmap="RdBu_r", vmin=0, vmax=1)
    right.contour(
        boundary(training.params, 201)[::-1],
        levels=[0.5],
        extent=(-0.5, 1.5, -0.5, 1.5),
        colors="black",
        linewidths=1.2,
    )
    for (x1, x2), target in zip(INPUTS.tolist(), TARGETS[:, 0].tolist(), strict=True):
        right.plot(x1, x2, "o", ms=11, mfc="#b2182b" if target else "#2166ac", mec="white", mew=1.8)
    right.set(xlabel="first input", ylabel="second input", title="What the net computes (line: 1/2)")
    figure.colorbar(image, ax=right, label="output")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Prints the lesson; exit status 1 where XOR is not learned or the check does not tell right from
    wrong."""
    parser = argparse.ArgumentParser(prog="python -m foundation.backprop_from_scratch", description=__doc__)
    parser.add_argument("--picture", type=Path, help="write loss curves and decision boundary to this file")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    start = init_params(jax.random.key(0))
    loss, cache = loss_forward(start)
    print(f"Before training: loss {loss:.4f}, and these gradients:")
    for name, grad in loss_backward(jnp.ones_like(loss), cache).items():
        print(f"  dL/d{name} = " + str(jnp.round(grad, 4)).replace("\n", "\n           "))

    right = run(Check("xor", "right", loss_forward, loss_backward, (start,)))
    wrong = run(Check("xor", "wrong", loss_forward, loss_backward_dividing_twice, (start,)))
    print("\nRelative error against autodiff and against finite differences:")
    for label, outcome in (("as derived", right), ("divided by the batch twice", wrong)):
        verdict = "ok" if outcome.passed else "FAILED"
        print(f"  {label:<28} {outcome.autodiff:>9.1e} {outcome.finite_difference:>9.1e}  {verdict}")

    training, twice = train(), train(loss_backward_dividing_twice)
    print("\n   step   loss     loss with the bug")
    for step in (0, 50, 100, 200, STEPS - 1):
        print(f"  {step:>5}   {training.losses[step]:.5f}  {twice.losses[step]:.5f}")
    print(f"\nDecision boundary (# above 1/2, . below), {correct(training.params)} of 4 points right:")
    for line in boundary(training.params, 21)[::2]:
        print("  " + "".join("#" if y > 0.5 else "." for y in line))
    if arguments.picture:
        draw(training, twice, arguments.picture)
    return 0 if correct(training.params) == 4 and right.passed and not wrong.passed else 1


if __name__ == "__main__":
    sys.exit(main())

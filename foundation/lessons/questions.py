"""The questions of the notebooks, chapter by chapter."""

import math

import jax
import jax.numpy as jnp

from foundation.exercises import Exercise, function, number
from foundation.lessons.questions_of_systems import SYSTEM_EXERCISES
from foundation.lessons.questions_of_training import TRAINING_EXERCISES


def _jacobian_transposed(matrix: jax.Array, d_y: jax.Array) -> jax.Array:
    return matrix.T @ d_y


def _cumsum_adjoint(d_y: jax.Array) -> jax.Array:
    return jnp.cumsum(d_y[::-1])[::-1]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _linear_d_kernel(x: jax.Array, d_y: jax.Array) -> jax.Array:
    return x.T @ d_y


def _bias_gradient(d_y: jax.Array) -> jax.Array:
    return jnp.sum(d_y, axis=(0, 1))


def _leaky_slope(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1.0, 0.1)


def _smoothed(p: jax.Array, onehot: jax.Array) -> jax.Array:
    return p - (0.9 * onehot + 0.1 / p.shape[-1])


def _softmax_gradient(p: jax.Array, d_p: jax.Array) -> jax.Array:
    return p * (d_p - jnp.sum(p * d_p))


def _tempered(p: jax.Array, d_p: jax.Array) -> jax.Array:
    return 2.0 * _softmax_gradient(p, d_p)


def _score_gradient(d_scores: jax.Array, q: jax.Array) -> jax.Array:
    return d_scores.T @ q / math.sqrt(q.shape[-1])


def _value_gradient(weights: jax.Array, d_o: jax.Array) -> jax.Array:
    return weights.T @ d_o


def _l2_norm_gradient(x: jax.Array, d_y: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.sum(x**2))
    n = x / length
    return (d_y - n * jnp.sum(d_y * n)) / length


def _turned_back(d_y: jax.Array, t: jax.Array) -> jax.Array:
    c, s = jnp.cos(t), jnp.sin(t)
    return jnp.stack([c * d_y[0] + s * d_y[1], -s * d_y[0] + c * d_y[1]])


def _residual(d_y: jax.Array, d_branch: jax.Array) -> jax.Array:
    return d_y + d_branch


def _swiglu_gate(a: jax.Array, u: jax.Array, d_h: jax.Array) -> jax.Array:
    s = _sigmoid(a)
    return d_h * u * s * (1.0 + a * (1.0 - s))


def _sigmoid_gate_gradient(z: jax.Array, d_g: jax.Array) -> jax.Array:
    g = _sigmoid(z)
    return d_g * g * (1.0 - g)


def _unit_gates_gradient(z: jax.Array, d_g: jax.Array) -> jax.Array:
    g = jnp.exp(z) / jnp.sqrt(jnp.sum(jnp.exp(2.0 * z)))
    return g * (d_g - g * jnp.sum(g * d_g))


def _squared_shares_gradient(z: jax.Array, f: jax.Array) -> jax.Array:
    tokens, experts = z.shape
    p = jnp.exp(z) / jnp.sum(jnp.exp(z), axis=-1, keepdims=True)
    mean = jnp.sum(p * f**2, axis=-1, keepdims=True)
    return experts / tokens * p * (f**2 - mean)


def _row_gradient(d_x: jax.Array) -> jax.Array:
    return jnp.sum(d_x, axis=0)


EXERCISES: dict[str, Exercise] = {
    "0.1": Exercise(
        "x is [4, 3], W is [3, 5], y = x W. How many entries has the Jacobian of y in W, one for each pair of an "
        "output and an input?",
        number(300.0, 1e-9),
        "y has 20 entries, W has 15.",
        300.0,
        "How many outputs are there, and how many entries of W?",
    ),
    "0.2": Exercise(
        "y = A x, with A [3, 4]. Write the vector-Jacobian product as a function of (A, d_y): it gives d_x.",
        function(_jacobian_transposed, (3, 4), (3,)),
        "The Jacobian is A itself, and d_x = J^T d_y. Of the two products of A and d_y, one has the shape of x.",
        _jacobian_transposed,
        "What is the Jacobian of y = A x? Then look at the shapes.",
    ),
    "0.3": Exercise(
        "f(x) = x^3 at x = 1, and (f(x + h) - f(x - h)) / 2h with h = 0.1. By how much is it above the slope 3?",
        number(0.01),
        "1.1^3 = 1.331 and 0.9^3 = 0.729.",
        0.01,
        "Compute both cubes. What is left of the difference after the slope 3 is taken out?",
    ),
    "0.4": Exercise(
        "y is the running sum of x: y_i = x_1 + ... + x_i. Write its adjoint, a function of d_y that gives d_x.",
        function(_cumsum_adjoint, (6,)),
        "x_i is in y_i and in every y after it, so d_x_i collects d_y_i and all after it: a running sum from the end.",
        _cumsum_adjoint,
        "In which y does x_1 occur, and in which does the last x?",
    ),
    "1.1": Exercise(
        "y = a b + a, at a = 3, b = -2. What is dy/da?",
        number(-1.0),
        "a is used twice; each use contributes, and the contributions add.",
        -1.0,
        "At how many places does a occur? What does each place contribute to the derivative?",
    ),
    "1.2": Exercise(
        "softplus(x) = ln(1 + e^x). Write its derivative as a function of x.",
        function(_sigmoid, (7,)),
        "Chain rule: 1/(1 + e^x) times e^x; divide above and below by e^x.",
        _sigmoid,
        "The logarithm is applied to an inner function. Which rule differentiates one function inside another?",
    ),
    "1.3": Exercise(
        "y = (a + b) (a - b), at a = 3, b = 1. Go through the graph: what arrives at b along both paths together?",
        number(-2.0),
        "Along a + b arrives the other factor, a - b = 2. Along a - b arrives -(a + b) = -4.",
        -2.0,
        "Two paths lead from b to y. Multiply the local derivatives along each path, with their signs.",
    ),
    "2.1": Exercise(
        "y = x W with x [B, I]. Write a function of (x, d_y) that gives d_W.",
        function(_linear_d_kernel, (5, 3), (5, 2)),
        "d_W has the shape of W, [I, O]; only one product of x and d_y has it. And no division by B.",
        _linear_d_kernel,
        "Which shape must d_W have? Which product of x and d_y has it?",
    ),
    "2.2": Exercise(
        "A batch of 4; d_W is divided by the batch a second time. What is the relative error of d_W?",
        number(0.75),
        "|g - g/4| / |g|.",
        0.75,
        "Write the wrong gradient as a multiple of the right one, g.",
    ),
    "2.3": Exercise(
        "y = x W + b with x [B, T, I] and b [O]. Write a function of d_y, [B, T, O], that gives d_b.",
        function(_bias_gradient, (2, 3, 4)),
        "b is used once in each of the B T rows, so d_b is the sum over both of these axes, not their mean.",
        _bias_gradient,
        "In how many entries of y is b_o used?",
    ),
    "3.1": Exercise(
        "leaky ReLU: y = x where x > 0, else x / 10. Write its derivative as a function of x.",
        function(_leaky_slope, (9,)),
        "Two cases, two constants; jnp.where.",
        _leaky_slope,
        "The function consists of two straight lines. What is the slope of each?",
    ),
    "3.2": Exercise(
        "Var(W) = 1 / fan_in and ReLU. By what factor does the mean square of a signal change over 20 layers?",
        number(2.0**-20),
        "He et al.: ReLU halves the second moment, once a layer.",
        2.0**-20,
        "What does one ReLU keep of the mean square of a symmetric signal? Then count the layers.",
    ),
    "3.3": Exercise(
        "An affine layer from 128 to 512 units, Var(W) = 1 / 128. By what factor does it change the variance of a "
        "gradient on its way back?",
        number(4.0),
        "Backward, each input collects from fan_out = 512 outputs.",
        4.0,
        "On the way back, how many outputs send a gradient to one input?",
    ),
    "4.1": Exercise(
        "The loss of a uniform guess over V = 50,257 tokens, in nats?",
        number(math.log(50_257)),
        "-ln(1/V).",
        math.log(50_257),
        "Which probability does a uniform guess give to the right token?",
    ),
    "4.2": Exercise(
        "Label smoothing: the target is 0.9 onehot + 0.1 / V. Write d_logits of one row as a function of (p, onehot).",
        function(_smoothed, (6,), (6,)),
        "d_logits is p minus the target, for any target that sums to 1.",
        _smoothed,
        "What is d_logits for a target that is onehot? Where did the derivation use that it is onehot?",
    ),
    "4.3": Exercise(
        "p = softmax(z / 0.5), a softmax at temperature 0.5. Write d_z of one row as a function of (p, d_p).",
        function(_tempered, (6,), (6,)),
        "Call u = z / 0.5. You know d_u. And z enters u with the factor 2.",
        _tempered,
        "Name what goes into the softmax, and use the chain rule in two steps.",
    ),
    "5.1": Exercise(
        "S = q k^T / sqrt(A). Write a function of (d_S, q) that gives d_k.",
        function(_score_gradient, (4, 5), (4, 3)),
        "The scores' columns are keys: d_k needs d_S transposed, and the 1 / sqrt(A) of the forward pass.",
        _score_gradient,
        "Which shape must d_k have? And the product has a factor in front of it: what becomes of that?",
    ),
    "5.2": Exercise(
        "Causal attention over T = 256 positions: which share of the scores is masked away?",
        number(255 / 512),
        "T (T - 1) / 2 of T^2.",
        255 / 512,
        "How many keys are masked for the first position, how many for the second, and how many for the last?",
    ),
    "5.3": Exercise(
        "o = P v, with P [T, S] and v [S, A]. Write a function of (P, d_o) that gives d_v.",
        function(_value_gradient, (4, 5), (4, 3)),
        "Position t read value s with weight P_ts. So value s collects P_ts d_o_t over all t: P transposed.",
        _value_gradient,
        "Take one position s. Which outputs read its value, and with which weights?",
    ),
    "6.1": Exercise(
        "n = x / |x| for one vector x. Write d_x as a function of (x, d_n).",
        function(_l2_norm_gradient, (5,), (5,)),
        "As in RMSNorm: take the part along n out of d_n, then divide by the length.",
        _l2_norm_gradient,
        "If x changes along n, does n change? So which part of d_n has no effect?",
    ),
    "6.2": Exercise(
        "RoPE, A = 64: after how many positions has the slowest pair turned once?",
        number(2.0 * math.pi * 10_000.0 ** (62 / 64)),
        "Its frequency is 10000^(-62/64); a turn is 2 pi.",
        2.0 * math.pi * 10_000.0 ** (62 / 64),
        "The frequency of a pair is the angle by which it turns from one position to the next. Which one is the "
        "smallest?",
    ),
    "6.3": Exercise(
        "A pair (a, b) is turned by the angle t: y = (a cos t - b sin t, a sin t + b cos t). Write a function of "
        "(d_y, t) that gives the gradient of the pair, [2].",
        function(_turned_back, (2,), ()),
        "The matrix of a rotation, transposed, is the rotation by -t.",
        _turned_back,
        "A product with a matrix sends gradients back through the transposed matrix. What does this one do to a pair?",
    ),
    "7.1": Exercise(
        "y = x + f(x). d_branch is what f's backward pass makes of d_y. Write d_x as a function of (d_y, d_branch).",
        function(_residual, (3, 4), (3, 4)),
        "x is used twice: by the sum itself, and by f.",
        _residual,
        "At how many places is x used?",
    ),
    "7.2": Exercise(
        "A block of width D = 64: attention with four matrices D x D, a SwiGLU network of hidden width 192 with three "
        "matrices, and two RMSNorms with a scale each. How many parameters?",
        number(53_376.0, 1e-9),
        "4 D^2 + 3 D F + 2 D.",
        53_376.0,
        "Write down the shape of every matrix and of every scale, and count the entries.",
    ),
    "7.3": Exercise(
        "h = silu(a) u, entry by entry, with silu(a) = a sigmoid(a). Write d_a as a function of (a, u, d_h).",
        function(_swiglu_gate, (5,), (5,), (5,)),
        "First the product: silu(a) gets d_h u. Then silu' = s (1 + a (1 - s)), with s = sigmoid(a).",
        _swiglu_gate,
        "h is a product of two factors. What arrives at the factor silu(a)? Then differentiate that factor.",
    ),
    "8.1": Exercise(
        "Another router. A token has chosen its experts, and z holds the logits of these experts alone. The gate of "
        "each is g = 1 / (1 + e^-z), computed from its own logit only, and not divided by a sum. d_g holds dL/dg for "
        "each of them. Write a function of (z, d_g) that gives dL/dz for each.",
        function(_sigmoid_gate_gradient, (6,), (6,)),
        "One gate depends on one logit, so this is elementwise: d_g times the slope of the sigmoid, g (1 - g).",
        _sigmoid_gate_gradient,
        "Which logits does one gate depend on? So which entries of the Jacobian are not 0?",
    ),
    "8.2": Exercise(
        "E = 8, and every token sends its one choice to expert 0 with probability 1. What is the balance loss?",
        number(8.0),
        "E sum_e f_e P_e with f_0 = P_0 = 1.",
        8.0,
        "Write down f and P of every expert. Only one expert has entries that are not 0.",
    ),
    "8.3": Exercise(
        "Another router, K > 1. Its gates are g_e = p_e / sqrt(sum of p_j^2 over the chosen experts j), with p the "
        "softmax over all experts. z holds the logits of the chosen experts. Write a function of (z, d_g) that gives "
        "dL/dz for these logits.",
        function(_unit_gates_gradient, (3,), (3,)),
        "ln g_e = z_e - ln(sum of e^(2 z_j)) / 2. So the derivative of g_e in z_j is g_e ([e = j] - g_j^2).",
        _unit_gates_gradient,
        "As in step 3, write p with exponentials and see what cancels. Then take the logarithm of a gate.",
    ),
    "8.4": Exercise(
        "A balance loss with squared shares: L = E sum_e f_e^2 P_e, where P_e is the mean over T tokens of p_te, and "
        "p = softmax(z) for each token. z is [T, E], and f is [E], counted as before. Write a function of (z, f) that "
        "gives dL/dz.",
        function(_squared_shares_gradient, (4, 6), (6,)),
        "dL/dp_te = E f_e^2 / T. Then the softmax's rule for each token: E / T p_te (f_e^2 - sum_j p_tj f_j^2).",
        _squared_shares_gradient,
        "Follow the three points of step 6. Does it matter to the derivative in p that f is squared?",
    ),
    "9.1": Exercise(
        "T = 100, E = 10, K = 2, capacity factor 1.1. How many places has an expert?",
        number(22.0, 1e-9),
        "ceil(1.1 T K / E), in exact arithmetic.",
        22.0,
        "What is the fair share of an expert, in choices?",
    ),
    "9.2": Exercise(
        "L = 6, z_coef = 0.001. The z-loss of one layer rises by 1. By how much does the training loss rise?",
        number(0.001 / 6),
        "Auxiliary losses are averaged over layers.",
        0.001 / 6,
        "Follow the z-loss of one layer to the training loss: two factors.",
    ),
    "9.3": Exercise(
        "A token occurs three times in a batch. d_x, [3, D], holds the gradients of its three look-ups. Write a "
        "function of d_x that gives the gradient of the token's row of the table.",
        function(_row_gradient, (3, 4)),
        "The row was used three times. What is used several times collects the sum.",
        _row_gradient,
        "How does the gradient of a value look that is used several times?",
    ),
    **TRAINING_EXERCISES,
    **SYSTEM_EXERCISES,
}

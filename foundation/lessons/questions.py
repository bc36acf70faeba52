"""The questions of the notebooks, chapter by chapter."""

import math

import jax
import jax.numpy as jnp

from foundation.exercises import Exercise, function, number
from foundation.lessons.questions_of_electives import ELECTIVE_EXERCISES


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _l2_norm_gradient(x: jax.Array, d_y: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.sum(x**2))
    n = x / length
    return (d_y - n * jnp.sum(d_y * n)) / length


def _angle_gradient(x: jax.Array, t: jax.Array, d_y: jax.Array) -> jax.Array:
    c, s = jnp.cos(t), jnp.sin(t)
    return d_y[0] * (-s * x[0] - c * x[1]) + d_y[1] * (c * x[0] - s * x[1])


def _sigmoid_gate_gradient(z: jax.Array, d_g: jax.Array) -> jax.Array:
    g = _sigmoid(z)
    return d_g * g * (1.0 - g)


def _unit_gates_gradient(z: jax.Array, d_g: jax.Array) -> jax.Array:
    g = jnp.exp(z) / jnp.sqrt(jnp.sum(jnp.exp(2.0 * z)))
    return g * (d_g - g * jnp.sum(g * d_g))


def _weighted_shares_gradient(z: jax.Array, w: jax.Array) -> jax.Array:
    tokens, experts = z.shape
    p = jnp.exp(z) / jnp.sum(jnp.exp(z), axis=-1, keepdims=True)
    mean = jnp.sum(p * w, axis=-1, keepdims=True)
    return experts / tokens * p * (w - mean)


EXERCISES: dict[str, Exercise] = {
    "0.1": number(
        "x is [4, 3], W is [3, 5], y = x W. How many entries has the Jacobian of y in W, one for each pair of an "
        "output and an input?",
        300.0,
        "y has 20 entries, W has 15.",
        "How many outputs are there, and how many entries of W?",
        1e-9,
    ),
    "0.2": function(
        "y = A x, with A [3, 4]. Write the vector-Jacobian product as a function of (A, d_y): it gives d_x.",
        lambda A, d_y: A.T @ d_y,
        [(3, 4), (3,)],
        "The Jacobian is A itself, and d_x = J^T d_y. Of the two products of A and d_y, one has the shape of x.",
        "What is the Jacobian of y = A x? Then look at the shapes.",
    ),
    "0.3": number(
        "f(x) = x^3 at x = 1, and (f(x + h) - f(x - h)) / 2h with h = 0.1. By how much is it above the slope 3?",
        0.01,
        "1.1^3 = 1.331 and 0.9^3 = 0.729.",
        "Compute both cubes. What is left of the difference after the slope 3 is taken out?",
    ),
    "0.4": function(
        "y is the running sum of x: y_i = x_1 + ... + x_i. Write its adjoint, a function of d_y that gives d_x.",
        lambda d_y: jnp.cumsum(d_y[::-1])[::-1],
        [(6,)],
        "x_i is in y_i and in every y after it, so d_x_i collects d_y_i and all after it: a running sum from the end.",
        "In which y does x_1 occur, and in which does the last x?",
    ),
    "1.1": number(
        "y = a b + a, at a = 3, b = -2. What is dy/da?",
        -1.0,
        "a is used twice; each use contributes, and the contributions add.",
        "At how many places does a occur? What does each place contribute to the derivative?",
    ),
    "1.2": function(
        "softplus(x) = ln(1 + e^x). Write its derivative as a function of x.",
        _sigmoid,
        [(7,)],
        "Chain rule: 1/(1 + e^x) times e^x; divide above and below by e^x.",
        "The logarithm is applied to an inner function. Which rule differentiates one function inside another?",
        {"this is softplus itself, and not its slope": lambda x: jnp.log(1.0 + jnp.exp(x))},
    ),
    "1.3": number(
        "y = (a + b) (a - b), at a = 3, b = 1. Go through the graph: what arrives at b along both paths together?",
        -2.0,
        "Along a + b arrives the other factor, a - b = 2. Along a - b arrives -(a + b) = -4.",
        "Two paths lead from b to y. Multiply the local derivatives along each path, with their signs.",
    ),
    "2.1": function(
        "A net that squeezes and stretches uses one matrix twice: y = (x W) W^T, with x [B, I] and W [I, O]. "
        "Write a function of (x, W, d_y), d_y [B, I], that gives d_W.",
        lambda x, W, d_y: x.T @ (d_y @ W) + d_y.T @ (x @ W),
        [(5, 3), (3, 2), (5, 3)],
        "Call h = x W. The first product gives x^T d_h with d_h = d_y W, the second d_y^T h. Two uses, so they add.",
        "Give the number between the two products a name, and look at each product by itself. How often is W used?",
    ),
    "2.2": number(
        "A batch of 4; d_W is divided by the batch a second time. What is the relative error of d_W?",
        0.75,
        "|g - g/4| / |g|.",
        "Write the wrong gradient as a multiple of the right one, g.",
    ),
    "2.3": function(
        "A learned volume: y = s x, with one number s for all of x, [B, T, I]. Write a function of (x, d_y) that "
        "gives d_s.",
        lambda x, d_y: jnp.sum(x * d_y),
        [(2, 3, 4), (2, 3, 4)],
        "s is in every y_bti, with the factor x_bti. Add up over all three axes: sum of x d_y.",
        "In how many entries of y is s, and with which factor?",
    ),
    "3.1": function(
        "leaky ReLU: y = x where x > 0, else x / 10. Write its derivative as a function of x.",
        lambda x: jnp.where(x > 0, 1.0, 0.1),
        [(9,)],
        "Two cases, two constants; jnp.where.",
        "The function consists of two straight lines. What is the slope of each?",
    ),
    "3.2": number(
        "Var(W) = 1 / fan_in and ReLU. By what factor does the mean square of a signal change over 20 layers?",
        2.0**-20,
        "He et al.: ReLU halves the second moment, once a layer.",
        "What does one ReLU keep of the mean square of a symmetric signal? Then count the layers.",
    ),
    "3.3": number(
        "An affine layer from 128 to 512 units, Var(W) = 1 / 128. By what factor does it change the variance of a "
        "gradient on its way back?",
        4.0,
        "Backward, each input collects from fan_out = 512 outputs.",
        "On the way back, how many outputs send a gradient to one input?",
    ),
    "4.1": number(
        "The loss of a uniform guess over V = 50,257 tokens, in nats?",
        math.log(50_257),
        "-ln(1/V).",
        "Which probability does a uniform guess give to the right token?",
    ),
    "4.2": function(
        "Label smoothing: the target is 0.9 onehot + 0.1 / V. Write d_logits of one row as a function of (p, onehot).",
        lambda p, onehot: p - (0.9 * onehot + 0.1 / p.shape[-1]),
        [(6,), (6,)],
        "d_logits is p minus the target, for any target that sums to 1.",
        "What is d_logits for a target that is onehot? Where did the derivation use that it is onehot?",
    ),
    "4.3": function(
        "p = softmax(z / 0.5), a softmax at temperature 0.5. Write d_z of one row as a function of (p, d_p).",
        lambda p, d_p: 2.0 * p * (d_p - jnp.sum(p * d_p)),
        [(6,), (6,)],
        "Call u = z / 0.5. You know d_u. And z enters u with the factor 2.",
        "Name what goes into the softmax, and use the chain rule in two steps.",
    ),
    "5.1": function(
        "Scores with a matrix between: S = q M k^T, with q [T, A], M [A, C] and k [S, C]. Write a function of (q, "
        "k, d_S) that gives d_M.",
        lambda q, k, d_S: q.T @ d_S @ k,
        [(4, 3), (5, 2), (4, 5)],
        "S_ts = sum of q_ta M_ac k_sc, so d_M_ac = sum over t and s of q_ta d_S_ts k_sc: q^T d_S k.",
        "Write one score as a sum. With which factor is M_ac in it? Which shape must d_M have?",
    ),
    "5.2": number(
        "Causal attention over T = 256 positions: which share of the scores is masked away?",
        255 / 512,
        "T (T - 1) / 2 of T^2.",
        "How many keys are masked for the first position, how many for the second, and how many for the last?",
    ),
    "5.3": function(
        "Attention with a sink: what a row of weights lacks to 1 goes to one learned vector u, [A], so o_t = "
        "sum_s P_ts v_s + (1 - sum_s P_ts) u. Write a function of (P, d_o), [T, S] and [T, A], that gives d_u.",
        lambda P, d_o: (1.0 - jnp.sum(P, axis=1)) @ d_o,
        [(4, 5), (4, 3)],
        "u is in every o_t with the weight 1 - sum_s P_ts, so d_u is the sum over t of that weight times d_o_t.",
        "In which outputs is u, and with which weight? One vector serves all rows.",
    ),
    "6.1": function(
        "n = x / |x| for one vector x. Write d_x as a function of (x, d_n).",
        _l2_norm_gradient,
        [(5,), (5,)],
        "As in RMSNorm: take the part along n out of d_n, then divide by the length.",
        "If x changes along n, does n change? So which part of d_n has no effect?",
    ),
    "6.2": number(
        "RoPE, A = 64: after how many positions has the slowest pair turned once?",
        2.0 * math.pi * 10_000.0 ** (62 / 64),
        "Its frequency is 10000^(-62/64); a turn is 2 pi.",
        "The frequency of a pair is the angle by which it turns from one position to the next. Which one is the "
        "smallest?",
    ),
    "6.3": function(
        "Five pairs (a_n, b_n), x [2, 5], are turned by *learned* angles t, [5]: y_n = (a_n cos t_n - b_n sin t_n, "
        "a_n sin t_n + b_n cos t_n). Write a function of (x, t, d_y), d_y [2, 5], that gives d_t.",
        _angle_gradient,
        [(2, 5), (5,), (2, 5)],
        "Differentiate both entries of y_n in t_n: (-a sin t - b cos t, a cos t - b sin t). Then multiply with d_y "
        "and add.",
        "t_n is in two entries of y. How does each of them change with it?",
        {
            "this is the gradient of the a_n": lambda x, t, d_y: d_y[0] * jnp.cos(t) + d_y[1] * jnp.sin(t),
            "d_y meets y itself, and not its slope in t": lambda x, t, d_y: (
                jnp.cos(t) * jnp.sum(d_y * x, axis=0) + jnp.sin(t) * (d_y[1] * x[0] - d_y[0] * x[1])
            ),
        },
    ),
    "7.1": function(
        "A block whose two branches stand side by side: n = x M, y = x + f(n) + g(n). (M stands for the norm.) "
        "d_a and d_f are what the backward passes of f and g make of d_y. Write a function of (d_y, d_a, d_f, M) "
        "that gives d_x.",
        lambda d_y, d_a, d_f, M: d_y + (d_a + d_f) @ M.T,
        [(3, 4), (3, 4), (3, 4), (4, 4)],
        "n is used twice, so d_n = d_a + d_f. It goes back through M, transposed, and the straight way adds d_y.",
        "At how many places is n used, and at how many is x?",
        {"both branches go back through M": lambda d_y, d_a, d_f, M: d_y + d_a + d_f @ M.T},
    ),
    "7.2": number(
        "A block of width D = 64: attention with four matrices D x D, a SwiGLU network of hidden width 192 with three "
        "matrices, and two RMSNorms with a scale each. How many parameters?",
        53_376.0,
        "4 D^2 + 3 D F + 2 D.",
        "Write down the shape of every matrix and of every scale, and count the entries.",
        1e-9,
    ),
    "7.3": function(
        "Another gate: h = relu(a)^2 u, entry by entry. Write d_a as a function of (a, u, d_h).",
        lambda a, u, d_h: d_h * u * 2.0 * jnp.maximum(a, 0.0),
        [(5,), (5,), (5,)],
        "relu(a)^2 gets d_h u. Its slope is 2 relu(a) times the slope of relu, which is 1 wherever relu(a) is not 0.",
        "h is a product of two factors. What arrives at the first one? Then differentiate that factor, inside out.",
    ),
    "8.1": function(
        "Another router. A token has chosen its experts, and z holds the logits of these experts alone. The gate of "
        "each is g = 1 / (1 + e^-z), computed from its own logit only, and not divided by a sum. d_g holds dL/dg for "
        "each of them. Write a function of (z, d_g) that gives dL/dz for each.",
        _sigmoid_gate_gradient,
        [(6,), (6,)],
        "One gate depends on one logit, so this is elementwise: d_g times the slope of the sigmoid, g (1 - g).",
        "Which logits does one gate depend on? So which entries of the Jacobian are not 0?",
    ),
    "8.2": number(
        "E = 8, and every token sends its one choice to expert 0 with probability 1. What is the balance loss?",
        8.0,
        "E sum_e f_e P_e with f_0 = P_0 = 1.",
        "Write down f and P of every expert. Only one expert has entries that are not 0.",
    ),
    "8.3": function(
        "Another router, K > 1. Its gates are g_e = p_e / sqrt(sum of p_j^2 over the chosen experts j), with p the "
        "softmax over all experts. z holds the logits of the chosen experts. Write a function of (z, d_g) that gives "
        "dL/dz for these logits.",
        _unit_gates_gradient,
        [(3,), (3,)],
        "ln g_e = z_e - ln(sum of e^(2 z_j)) / 2. So the derivative of g_e in z_j is g_e ([e = j] - g_j^2).",
        "As in step 3, write p with exponentials and see what cancels. Then take the logarithm of a gate.",
        {"this is the rule for gates that add up to 1": lambda z, d_g: (g := jax.nn.softmax(z)) * (d_g - g @ d_g)},
    ),
    "8.4": function(
        "A balance loss with squared shares: L = E sum_e f_e^2 P_e, where P_e is the mean over T tokens of p_te, and "
        "p = softmax(z) for each token. z is [T, E], and f is [E], counted as before. Write a function of (z, f) that "
        "gives dL/dz.",
        lambda z, f: _weighted_shares_gradient(z, f**2),
        [(4, 6), (6,)],
        "dL/dp_te = E f_e^2 / T. Then the softmax's rule for each token: E / T p_te (f_e^2 - sum_j p_tj f_j^2).",
        "Follow the three points of step 6. Does it matter to the derivative in p that f is squared?",
        {"f stands where its square belongs": lambda z, f: _weighted_shares_gradient(z, f)},
    ),
    "8.5": number(
        "Balance by a bias. Two experts, K = 1, and every token has the scores (0.52, 0.48). The bias begins at 0, and "
        "its rate is 0.005. After how many steps does the choice change for the first time?",
        5.0,
        "Each step moves the two apart by 2 rate = 0.01. The gap is 0.04; at an exact tie the first expert is taken.",
        "By how much does one step move each of the two biases, and in which direction? How large is the gap at first?",
        1e-9,
    ),
    "9.1": number(
        "T = 100, E = 10, K = 2, capacity factor 1.1. How many places has an expert?",
        22.0,
        "ceil(1.1 T K / E), in exact arithmetic.",
        "What is the fair share of an expert, in choices?",
        1e-9,
    ),
    "9.2": number(
        "L = 6, z_coef = 0.001. The z-loss of one layer rises by 1. By how much does the training loss rise?",
        0.001 / 6,
        "Auxiliary losses are averaged over layers.",
        "Follow the z-loss of one layer to the training loss: two factors.",
    ),
    "9.3": function(
        "A tied table, whose look-up multiplies a row by sqrt(D). The head does not: the logit of token v is the "
        "inner product of the stream with row v. Token v was looked up three times, d_x [3, D]. Over all "
        "positions the head had the streams x, [N, D], and the cotangents of v's logit, d_l [N]. Write a function "
        "of (d_x, x, d_l) that gives the gradient of row v.",
        lambda d_x, x, d_l: math.sqrt(x.shape[-1]) * jnp.sum(d_x, axis=0) + d_l @ x,
        [(3, 4), (5, 4), (5,)],
        "sqrt(D) times the sum of the three, and from the head the sum over positions of d_l times x.",
        "The row is used 3 + N times. What does each use multiply it by?",
    ),
    **ELECTIVE_EXERCISES,
}

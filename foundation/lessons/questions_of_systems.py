"""The questions of chapters 17 and later."""

import math

import jax
import jax.numpy as jnp

from foundation.exercises import Exercise, function, number


def _up(x: jax.Array, s: jax.Array) -> jax.Array:
    return x / jnp.abs(s) - jnp.floor(x / jnp.abs(s))


def _scales_of_inputs(x: jax.Array, q: jax.Array, d_y: jax.Array) -> jax.Array:
    return jnp.sum(x * (d_y @ q.T), axis=0)


def _scanned_back(d_y: jax.Array) -> jax.Array:
    return jnp.cumsum(d_y[::-1], axis=0)[::-1]


def _unigram_bits(counts: jax.Array, lengths: jax.Array) -> jax.Array:
    n = jnp.abs(counts)
    return -jnp.sum(n * jnp.log2(n / jnp.sum(n))) / jnp.sum(n * jnp.abs(lengths))


def _back_through_softmax(d_p: jax.Array, p: jax.Array) -> jax.Array:
    return p * (d_p - jnp.sum(p * d_p))


def _bonus_gradient(z: jax.Array, r: jax.Array) -> jax.Array:
    p = jax.nn.softmax(z)
    return _back_through_softmax(r - 0.1 * jnp.log(p) - 0.1, p)


def _reverse_kl_gradient(z: jax.Array, q: jax.Array) -> jax.Array:
    return jax.nn.softmax(z) - jax.nn.softmax(q)


SYSTEM_EXERCISES: dict[str, Exercise] = {
    "17.1": number(
        "A weight of 1.0 is stored in bfloat16 and rounded to nearest. It gets 1,000 steps of 0.003 upwards. Where is "
        "it in the end?",
        1.0,
        "Between 1 and 2 the spacing is 2^-7 = 0.0078. Is 0.003 at least half of it?",
        "How far apart are the bfloat16 numbers around the weight? Compare one step with this distance.",
        1e-9,
    ),
    "17.2": number(
        "The same weight and the same steps, each rounded by a draw. Where is it on average? (Where the weight has "
        "passed 2, the spacing is twice as large. Does that matter for the average?)",
        4.0,
        "The mean of each rounding is exact, whatever the spacing: 1 + 1000 * 0.003.",
        "What is the mean of a number after it has been rounded by a draw?",
        1e-9,
    ),
    "17.3": function(
        "Numbers lie |s| apart, at the multiples of |s|. Write a function of (x, s), x [6] and s a number, that gives "
        "for each x the probability that a draw rounds it up.",
        _up,
        [(6,), ()],
        "The distance from the neighbour below, in units of the spacing: q - floor(q), with q = x / |s|.",
        "Which two neighbours has x? Where between them does it lie?",
    ),
    "18.1": number(
        "A matrix of 1024 x 1024 weights in 4 bits, with a scale of 16 bits for every 32. How many bits is that a "
        "weight?",
        4.5,
        "16 bits are shared by 32 weights.",
        "How many weights share one scale? How many bits of it belong to each?",
        1e-9,
    ),
    "18.2": function(
        "Codes with a scale for each *input*: w_do = s_d q_do, and y = x w. Write a function of (x, q, d_y), x "
        "[5, 4], q [4, 3], d_y [5, 3], that gives d_s, [4].",
        _scales_of_inputs,
        [(5, 4), (4, 3), (5, 3)],
        "s_d is in y_to with the factor x_td q_do: the sum over t and o of x_td q_do d_y_to.",
        "Write one y_to as a sum over d. This scale can't leave the sum. What is its factor?",
    ),
    "18.3": number(
        "Two inputs are always equal: x_0 = x_1. Weight 0 is rounded up by 0.3. By how much should weight 1 move?",
        -0.3,
        "Only w_0 + w_1 can be seen in the output.",
        "What does the output depend on, if both inputs are always the same number?",
        1e-9,
    ),
    "19.1": number(
        "8 ranks add up their losses with an all_reduce, and each starts its backward pass from the sum with d_L = 1. "
        "By which factor are the gradients too large?",
        8.0,
        "What is differentiated is the sum of the ranks' losses, and they are all equal.",
        "Each rank has a copy of the sum, and starts from it. Which scalar is differentiated in all?",
        1e-9,
    ),
    "19.2": function(
        "Another collective, the scan: rank r gets the sum of x over the ranks 0 to r. Write a function of d_y, "
        "[4, 8], one row for each rank, that gives the gradient of x.",
        _scanned_back,
        [(4, 8)],
        "x_s is on the ranks s, s + 1, ...: its gradient is the sum of their d_y, a running sum from the last rank.",
        "Which ranks have x_0 in their sum, and which have the last rank's x?",
    ),
    "19.3": number(
        "An array of 100 MB is added up over 16 ranks by a ring. How many MB does each rank send?",
        187.5,
        "2 (R - 1) messages of 1/R of the array.",
        "First the ring adds the pieces up, then it hands the sums on. How many messages is that, and how large is "
        "one?",
        1e-9,
    ),
    "20.1": number(
        'Which is the most frequent pair of neighbours in "banana bandana"? Give how often it occurs.',
        4.0,
        "Count each place: b-an-an-a and b-an-d-an-a.",
        "Go through both words letter by letter, and write down every pair.",
        1e-9,
    ),
    "20.2": number(
        "A model has a loss of 2.8 nats a token, and a token has 4 bytes on average. How many bits per byte is that?",
        2.8 / 4 / math.log(2.0),
        "A nat is 1 / ln 2 bits.",
        "Two units change: tokens become bytes, and nats become bits.",
    ),
    "20.3": function(
        "Write a function of (counts, lengths), both [6]: how often each token occurs, and how many bytes it has. It "
        "gives the bits per byte of a model that knows the frequencies and nothing else. (Of the absolute values.)",
        _unigram_bits,
        [(6,), (6,)],
        "The sum of -count log2(count / total), divided by the sum of count * length.",
        "Which probability does this model give to each token, and how many bits does that take? How many bytes "
        "has the text?",
    ),
    "21.1": number(
        "A group has 4 texts, and its mean reward is the baseline. The expected gradient is how many times dJ?",
        0.75,
        "One of the four rewards in the baseline is the text's own.",
        "The baseline contains the reward of the text itself. What does this part do to the expectation?",
        1e-9,
    ),
    "21.2": function(
        "A bonus for variety: J = sum of p r - 0.1 sum of p ln p, with p = softmax(z). Write a function of (z, "
        "r), both [3], that gives dJ/dz.",
        _bonus_gradient,
        [(3,), (3,)],
        "dJ/dp = r - 0.1 ln p - 0.1, and the softmax's rule takes the constant out. So r - 0.1 ln p acts as the "
        "reward.",
        "Differentiate in p. Which of the terms is the same for every text, and what becomes of it?",
    ),
    "21.3": function(
        "Write a function of (z, q), both [3], with pi = softmax(z) and ref = softmax(q). It gives the gradient in z "
        "of KL(ref || pi).",
        _reverse_kl_gradient,
        [(3,), (3,)],
        "-sum over y of ref(y) (onehot_y - pi) = pi - ref.",
        "Which of the two distributions depends on z, and which one is a constant?",
    ),
}

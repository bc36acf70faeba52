"""The questions of chapters 17 and later."""

import math

import jax
import jax.numpy as jnp

from foundation.exercises import Exercise, function, number


def _up(x: jax.Array, s: jax.Array) -> jax.Array:
    return x / jnp.abs(s) - jnp.floor(x / jnp.abs(s))


def _scaled(x: jax.Array, q: jax.Array, s: jax.Array) -> jax.Array:
    return x @ q * s


def _gathered_back(d_y: jax.Array) -> jax.Array:
    return jnp.sum(d_y, axis=0).reshape(len(d_y), -1)


def _unigram_bits(counts: jax.Array, lengths: jax.Array) -> jax.Array:
    n = jnp.abs(counts)
    return -jnp.sum(n * jnp.log2(n / jnp.sum(n))) / jnp.sum(n * jnp.abs(lengths))


def _reward_gradient(z: jax.Array, r: jax.Array) -> jax.Array:
    p = jax.nn.softmax(z)
    return p * (r - jnp.sum(p * r))


def _reverse_kl_gradient(z: jax.Array, q: jax.Array) -> jax.Array:
    return jax.nn.softmax(z) - jax.nn.softmax(q)


SYSTEM_EXERCISES: dict[str, Exercise] = {
    "17.1": Exercise(
        "A weight of 1.0 is stored in bfloat16 and rounded to nearest. It gets 1,000 steps of 0.003 upwards. Where is "
        "it in the end?",
        number(1.0, 1e-9),
        "Between 1 and 2 the spacing is 2^-7 = 0.0078. Is 0.003 at least half of it?",
        1.0,
        "How far apart are the bfloat16 numbers around the weight? Compare one step with this distance.",
    ),
    "17.2": Exercise(
        "The same weight and the same steps, each rounded by a draw. Where is it on average? (Where the weight has "
        "passed 2, the spacing is twice as large. Does that matter for the average?)",
        number(4.0, 1e-9),
        "The mean of each rounding is exact, whatever the spacing: 1 + 1000 * 0.003.",
        4.0,
        "What is the mean of a number after it has been rounded by a draw?",
    ),
    "17.3": Exercise(
        "Numbers lie |s| apart, at the multiples of |s|. Write a function of (x, s), x [6] and s a number, that gives "
        "for each x the probability that a draw rounds it up.",
        function(_up, (6,), ()),
        "The distance from the neighbour below, in units of the spacing: q - floor(q), with q = x / |s|.",
        _up,
        "Which two neighbours has x? Where between them does it lie?",
    ),
    "17.4": Exercise(
        "A gradient a little above 2^-26 becomes 0 in float16. What is the smallest k for which the scale 2^k keeps "
        "11 of its bits?",
        number(12.0, 1e-9),
        "The smallest float16 with 11 bits is 2^-14.",
        12.0,
        "Below which size does a float16 lose bits? How many doublings lead there from the gradient?",
    ),
    "18.1": Exercise(
        "A matrix of 1024 x 1024 weights in 4 bits, with a scale of 16 bits for every 32. How many bits is that a "
        "weight?",
        number(4.5, 1e-9),
        "16 bits are shared by 32 weights.",
        4.5,
        "How many weights share one scale? How many bits of it belong to each?",
    ),
    "18.2": Exercise(
        "Write a function of (x, q, s), x [5, 4], q [4, 3], s [3], that gives x times the matrix with the columns "
        "s_o q[:, o].",
        function(_scaled, (5, 4), (4, 3), (3,)),
        "The scale does not depend on the input, so it can be multiplied last.",
        _scaled,
        "A scale belongs to a whole column. Must it be applied before the sum over the inputs?",
    ),
    "18.3": Exercise(
        "Two inputs are always equal: x_0 = x_1. Weight 0 is rounded up by 0.3. By how much should weight 1 move?",
        number(-0.3, 1e-9),
        "Only w_0 + w_1 can be seen in the output.",
        -0.3,
        "What does the output depend on, if both inputs are always the same number?",
    ),
    "18.4": Exercise(
        "H is the identity times 2. What does it cost, in L, that a weight is off by 0.5, after the others have moved "
        "as well as they can?",
        number(0.5, 1e-9),
        "e^2 / H^-1[k, k]. The inputs have nothing in common, so no other weight can help.",
        0.5,
        "What does a diagonal H say about the inputs? Can another weight then make up for the error?",
    ),
    "19.1": Exercise(
        "8 ranks add up their losses with an all_reduce, and each starts its backward pass from the sum with d_L = 1. "
        "By which factor are the gradients too large?",
        number(8.0, 1e-9),
        "What is differentiated is the sum of the ranks' losses, and they are all equal.",
        8.0,
        "Each rank has a copy of the sum, and starts from it. Which scalar is differentiated in all?",
    ),
    "19.2": Exercise(
        "Write a function of d_y, [4, 8], that gives the gradient of x, [4, 2], for an all_gather over 4 ranks.",
        function(_gathered_back, (4, 8)),
        "Sum over the ranks, then give part s to rank s.",
        _gathered_back,
        "Every rank has a copy of the gathered array. What becomes of the gradients of these copies, and who gets "
        "which rows?",
    ),
    "19.3": Exercise(
        "An array of 100 MB is added up over 16 ranks by a ring. How many MB does each rank send?",
        number(187.5, 1e-9),
        "2 (R - 1) messages of 1/R of the array.",
        187.5,
        "First the ring adds the pieces up, then it hands the sums on. How many messages is that, and how large is "
        "one?",
    ),
    "19.4": Exercise(
        "16 ranks, 1,000 tokens on each, K = 2 choices, width 512 in 2 bytes, loads even. How many bytes does a rank "
        "send to other ranks in the first all_to_all?",
        number(1_920_000.0, 1e-9),
        "1,000 * 2 rows of 1,024 bytes, of which 15/16 leave.",
        1_920_000.0,
        "How many rows does a rank have to send, and how large is a row? Which of them stay where they are?",
    ),
    "20.1": Exercise(
        'Which is the most frequent pair of neighbours in "banana bandana"? Give how often it occurs.',
        number(4.0, 1e-9),
        "Count each place: b-an-an-a and b-an-d-an-a.",
        4.0,
        "Go through both words letter by letter, and write down every pair.",
    ),
    "20.2": Exercise(
        "A model has a loss of 2.8 nats a token, and a token has 4 bytes on average. How many bits per byte is that?",
        number(2.8 / 4 / math.log(2.0)),
        "A nat is 1 / ln 2 bits.",
        2.8 / 4 / math.log(2.0),
        "Two units change: tokens become bytes, and nats become bits.",
    ),
    "20.3": Exercise(
        "Write a function of (counts, lengths), both [6]: how often each token occurs, and how many bytes it has. It "
        "gives the bits per byte of a model that knows the frequencies and nothing else. (Of the absolute values.)",
        function(_unigram_bits, (6,), (6,)),
        "The sum of -count log2(count / total), divided by the sum of count * length.",
        _unigram_bits,
        "Which probability does this model give to each token, and how many bits does that take? How many bytes "
        "has the text?",
    ),
    "21.1": Exercise(
        "A group has 4 texts, and its mean reward is the baseline. The expected gradient is how many times dJ?",
        number(0.75, 1e-9),
        "One of the four rewards in the baseline is the text's own.",
        0.75,
        "The baseline contains the reward of the text itself. What does this part do to the expectation?",
    ),
    "21.2": Exercise(
        "Three texts with probabilities p = softmax(z). Write a function of (z, r), both [3], that gives the gradient "
        "of the expected reward in z.",
        function(_reward_gradient, (3,), (3,)),
        "p (r - J), with J = sum of p r.",
        _reward_gradient,
        "What is the derivative of one probability in one logit? Each of them counts with its reward.",
    ),
    "21.3": Exercise(
        "Write a function of (z, q), both [3], with pi = softmax(z) and ref = softmax(q). It gives the gradient in z "
        "of KL(ref || pi).",
        function(_reverse_kl_gradient, (3,), (3,)),
        "-sum over y of ref(y) (onehot_y - pi) = pi - ref.",
        _reverse_kl_gradient,
        "Which of the two distributions depends on z, and which one is a constant?",
    ),
    "21.4": Exercise(
        "eps = 0.2. A text with a negative advantage has rho = 1.5. Does it still get a gradient? (1: yes, 0: no.)",
        number(1.0, 1e-9),
        "min(1.5 A, 1.2 A) with A below 0 is 1.5 A, the plain branch.",
        1.0,
        "The smaller of two branches counts. Which one is smaller if the advantage is negative?",
    ),
}

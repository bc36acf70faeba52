"""The questions of the chapters from 10 on."""

import math

import jax
import jax.numpy as jnp

from foundation.exercises import Exercise, function, number


def _merged_answers(a: jax.Array, la: jax.Array, b: jax.Array, lb: jax.Array) -> jax.Array:
    share = 1.0 / (1.0 + jnp.exp(lb - la))[:, None]
    return share * a + (1.0 - share) * b


def _newest_output(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jnp.exp(k @ q / math.sqrt(q.shape[-1]))
    return weights @ v / jnp.sum(weights)


def _weights_under_perplexity(m: jax.Array, n: jax.Array) -> jax.Array:
    share = n / jnp.sum(n)
    return jnp.exp(jnp.sum(share * m)) * share


def _sequence_against_batch(f: jax.Array) -> jax.Array:
    sequences, experts = f.shape
    return experts / sequences * (f - jnp.mean(f, axis=0))


def _parted(z: jax.Array, h: jax.Array, d_y: jax.Array) -> jax.Array:
    g = jnp.exp(z) / jnp.sum(jnp.exp(z))
    d_g = h @ d_y
    return g * (d_g - g @ d_g)


def _unigram_bits(counts: jax.Array, lengths: jax.Array) -> jax.Array:
    n = jnp.abs(counts)
    return -jnp.sum(n * jnp.log2(n / jnp.sum(n))) / jnp.sum(n * jnp.abs(lengths))


def _bonus_gradient(z: jax.Array, r: jax.Array) -> jax.Array:
    p = jax.nn.softmax(z)
    d_p = r - 0.1 * jnp.log(p) - 0.1
    return p * (d_p - jnp.sum(p * d_p))


def _kl_gradient(z: jax.Array, q: jax.Array) -> jax.Array:
    p, ratio = jax.nn.softmax(z), jax.nn.log_softmax(z) - jax.nn.log_softmax(q)
    return p * (ratio - jnp.sum(p * ratio))


ELECTIVE_EXERCISES: dict[str, Exercise] = {
    "10.1": number(
        "Adam, learning rate 0.01, the very first step. The gradient of a weight is -250. By how much does the weight "
        "change?",
        0.01,
        "After one step the corrected mean of g is g, and that of g^2 is g^2. What is g / sqrt(g^2)?",
        "Both running averages are corrected for their start at 0. What is each after one step?",
    ),
    "10.2": function(
        "Another size of a step: the *sum* of the magnitudes of its entries. Write a function of g, [2], that gives "
        "the steepest step of size 1.",
        lambda g: jnp.where(jnp.abs(g) == jnp.max(jnp.abs(g)), -jnp.sign(g), 0.0),
        [(2,)],
        "All of the sum is best spent where |g| is largest, and nothing elsewhere.",
        "The sum of the magnitudes is given. At which entry does the same magnitude lower the loss most?",
        {
            "this step has the size 1, but it is not the steepest": lambda g: -g / jnp.sum(jnp.abs(g)),
            "this is the steepest step of another size, the root of the sum of squares": lambda g: -g / jnp.hypot(*g),
        },
    ),
    "10.3": function(
        "Adafactor with rows alone: the squares v of a gradient g, [3, 4], are fitted by w_ij = r_i. Write a "
        "function of g that gives the r, [3], that are nearest in the divergence, the sum of v log(v / w) - v + "
        "w.",
        lambda g: jnp.mean(g**2, axis=1),
        [(3, 4)],
        "The derivative in r_i is 4 - (row sum of v) / r_i. So r_i is the mean of its row.",
        "Differentiate the divergence in r_i and set it to 0. How many entries w_ij are equal to r_i?",
    ),
    "11.1": number(
        "A query has seen scores with the largest m = 2 and l = 3. The next key has the score 5. What is l now?",
        1.0 + 3.0 * math.exp(-3.0),
        "The new m is 5. The old sum shrinks by e^(2 - 5), and the new key adds e^0.",
        "The largest score changes. What does that do to the sum that was made with the old one?",
    ),
    "11.2": function(
        "Two pieces of keys have given the answers a and b, [4, 3], each as if it were alone, and the logsumexp of "
        "their scores, la and lb, [4]. Write a function of (a, la, b, lb) that gives the answer for both together.",
        _merged_answers,
        [(4, 3), (4,), (4, 3), (4,)],
        "Each piece counts with the weight e^(its logsumexp), divided by the sum of both weights.",
        "In a softmax over all keys together, how large is the share of each piece?",
        {
            "a logsumexp is a logarithm: the weight is its exponential": lambda a, la, b, lb: (
                (a * la[:, None] + b * lb[:, None]) / (la + lb)[:, None]
            ),
        },
    ),
    "11.3": function(
        "A row may look at nothing: P_s = e^(S_s) / (l + e^b), with a learned number b and l the sum of e^(S_s). "
        "So P adds up to 1 - p_b, where p_b = e^b / (l + e^b). Write a function of (p_b, d_o, o), [5], [5, 3] and "
        "[5, 3], that gives each row's part of d_b.",
        lambda p_b, d_o, o: -p_b * jnp.sum(d_o * o, axis=-1),
        [(5,), (5, 3), (5, 3)],
        "dP_s / db = -P_s p_b. So d_b = -p_b <d_P, P>, and the row sum of d_P P is <d_o, o>.",
        "How does P_s change with b? Then look for a row sum that you know already.",
    ),
    "12.1": number(
        "A model of 6 layers and 8 heads of width 64, in float32 (4 bytes). How many bytes of keys and values does "
        "the cache hold for each position?",
        24_576.0,
        "Two arrays, of 6 x 8 x 64 numbers each.",
        "Which arrays are kept for each position, in how many layers, and for how many heads?",
        1e-9,
    ),
    "12.2": number(
        'K = 2, E = 16, capacity factor 1.25, rule "token". A text of 100 tokens grows, token by token. At which '
        "length does the capacity of an expert change for the first time?",
        103.0,
        "ceil(1.25 * 100 * 2 / 16) = 16. It stays 16 until 1.25 * T * 2 / 16 is above 16. Most steps change nothing. "
        "This is why such a fault is found late.",
        "Write the capacity as a function of T. It is rounded up, so it changes at a few lengths only.",
        1e-9,
    ),
    "12.3": function(
        "A cache of one head holds keys k, [N, A], and values v, [N, A], of all positions so far. Write a function of "
        "(q, k, v), with q [A] the query of the newest position, that gives its output, [A].",
        _newest_output,
        [(4,), (6, 4), (6, 4)],
        "Scores k q / sqrt(A), a softmax over the N positions, and the mixture of the values. No mask is needed.",
        "The newest position may look at every key in the cache. Which three steps does attention take?",
    ),
    "13.1": number(
        "Two micro-batches: 10 tokens with a mean loss of 2 nats, and 90 tokens with a mean loss of 1. By how much is "
        "the mean of the two means above the loss of the batch?",
        0.4,
        "(10 * 2 + 90 * 1) / 100, and (2 + 1) / 2.",
        "The loss of the batch is a mean over all 100 tokens. What is the sum of their losses?",
    ),
    "13.2": function(
        "A program descends the perplexity of the batch, e^L, instead of L. Micro-batch i has the mean loss m_i over "
        "n_i tokens. Write a function of (m, n), both [M], that gives the weights w: the gradient of the perplexity is "
        "the sum of w_i times the gradient of m_i.",
        _weights_under_perplexity,
        [(4,), (4,)],
        "The slope of e^L is e^L, and L is the sum of the m_i by their shares. So w_i = e^L n_i / n. It needs the "
        "losses of all micro-batches, so no first gradient is right before the last loss is known.",
        "Go from the perplexity to L, and from L to one m_i. Is the perplexity a sum over micro-batches?",
    ),
    "13.3": function(
        "f and P, both [B, E], hold the shares and the mean probabilities of B equally long sequences. f is counted, "
        "so it is a constant. Write a function of f that gives, [B, E], the gradient in P of the balance loss by "
        "sequence minus the gradient in P of the balance loss by batch.",
        _sequence_against_batch,
        [(5, 3)],
        "By sequence, P_ie has the factor E f_ie / B. By batch it has E / B times the mean of f_e over the sequences. "
        "So within one sequence the first pushes away from the sequence's own favourites.",
        "In which terms of each of the two losses does one entry of P occur? What is it multiplied by?",
    ),
    "14.1": number(
        "E copies of a network, K = 2, nothing dropped, gates that add up to 1. The dense network's weights would get "
        "the gradient G. The gradients of the E copies, added up, are how many times G?",
        1.0,
        "A token gives expert e its gate times what it would give the dense network. What do the gates add up to?",
        "Take one token and compare the gradient of one copy with the gradient of the dense network. What does the "
        "gate do?",
        1e-9,
    ),
    "14.2": function(
        "Later the experts have parted: the K chosen ones answer h, [3, 4], with gates g = softmax(z), z [3]. Write a "
        "function of (z, h, d_y), d_y [4], that gives the gradient of z.",
        _parted,
        [(3,), (3, 4), (4,)],
        "d_g = h d_y, one number for each expert. Then the softmax's rule. If all rows of h were equal, it would be 0.",
        "Go back in two steps: from d_y to each gate, and from the gates to the logits.",
        {"this is the gradient of the gates: the softmax is still to come": lambda z, h, d_y: h @ d_y},
    ),
    "14.3": number(
        "LoRA of rank 8 on a matrix of 1024 x 4096. How many times fewer numbers are trained than in all of it?",
        102.4,
        "1024 * 4096 numbers against 8 * (1024 + 4096).",
        "How many numbers have A and B together?",
    ),
    "15.1": number(
        "Probabilities 0.5, 0.3, 0.15, 0.05, and top-p = 0.7. After the filter, what is the probability of the first "
        "token?",
        0.625,
        "0.5 does not reach 0.7; 0.5 + 0.3 does. Two tokens stay.",
        "Add up the probabilities in order. Which tokens stay, and what must be done so that they are "
        "probabilities again?",
    ),
    "15.2": function(
        "p = softmax(u) is the law of the large model, q = softmax(v) that of the draft. Write a function of (u, v), "
        "both [6], that gives the probability that a proposal is accepted.",
        lambda u, v: jnp.sum(jnp.minimum(jax.nn.softmax(u), jax.nn.softmax(v))),
        [(6,), (6,)],
        "The sum over x of q_x min(1, p_x / q_x), which is min(p_x, q_x).",
        "A token is proposed with one probability, and then accepted with another. Add up over all tokens.",
        {
            "the probability of each proposal is missing": lambda u, v: jnp.sum(
                jnp.minimum(1.0, jax.nn.softmax(u) / jax.nn.softmax(v))
            ),
            "this is the probability that a proposal is rejected": lambda u, v: jnp.sum(
                jnp.maximum(jax.nn.softmax(u) - jax.nn.softmax(v), 0.0)
            ),
            "u and v are logits: take a softmax first": lambda u, v: jnp.sum(jnp.minimum(u, v)),
        },
    ),
    "15.3": number(
        "A proposal is accepted with probability 0.8, and a round proposes 4. How many tokens does a round give, on "
        "average?",
        3.3616,
        "1 + a + a^2 + a^3 + a^4.",
        "A round always gives one token. When does it give a second one, and a third?",
    ),
    "16.1": number(
        "A mixture has 3e9 parameters in matrices, and 1e9 of them are multiplied with a token. It is trained on 2e10 "
        "tokens. How many FLOP is that?",
        1.2e20,
        "6 N D, with the active entries as N.",
        "Which of the two numbers of parameters is N?",
    ),
    "16.2": number(
        "A card does 990e12 FLOP/s and reads 3.35e12 bytes/s. Weights have 2 bytes. How many texts must be written at "
        "once so that reading the weights is no longer the limit?",
        990 / 3.35,
        "B texts: 2 B FLOP for each weight of 2 bytes. So B FLOP a byte, against rate / bandwidth.",
        "What is the intensity of a step in which each weight is read once and used for B tokens?",
    ),
    "16.3": number(
        "L = a C^-b with b = 0.1, and no floor. By which factor must C grow to halve the loss?",
        1024.0,
        "C^-0.1 is halved where C is 2^10 times as large.",
        "Write the loss of both budgets, and divide.",
    ),
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
        lambda x, s: x / jnp.abs(s) - jnp.floor(x / jnp.abs(s)),
        [(6,), ()],
        "The distance from the neighbour below, in units of the spacing: q - floor(q), with q = x / |s|.",
        "Which two neighbours has x? Where between them does it lie?",
        {"this is the probability of rounding down": lambda x, s: jnp.ceil(x / jnp.abs(s)) - x / jnp.abs(s)},
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
        lambda x, q, d_y: jnp.sum(x * (d_y @ q.T), axis=0),
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
        lambda d_y: jnp.cumsum(d_y[::-1], axis=0)[::-1],
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
        lambda z, q: jax.nn.softmax(z) - jax.nn.softmax(q),
        [(3,), (3,)],
        "-sum over y of ref(y) (onehot_y - pi) = pi - ref.",
        "Which of the two distributions depends on z, and which one is a constant?",
        {"this is the gradient of KL(pi || ref)": _kl_gradient},
    ),
}

"""The questions of chapters 10 and later."""

import math

import jax
import jax.numpy as jnp

from foundation.exercises import Exercise, function, number


def _one_coordinate(g: jax.Array) -> jax.Array:
    largest = jnp.abs(g) == jnp.max(jnp.abs(g))
    return jnp.where(largest, -jnp.sign(g), 0.0)


def _fit_of_rows(g: jax.Array) -> jax.Array:
    return jnp.mean(g**2, axis=1)


def _merged_answers(a: jax.Array, la: jax.Array, b: jax.Array, lb: jax.Array) -> jax.Array:
    share = 1.0 / (1.0 + jnp.exp(lb - la))[:, None]
    return share * a + (1.0 - share) * b


def _sink_logit(p_b: jax.Array, d_o: jax.Array, o: jax.Array) -> jax.Array:
    return -p_b * jnp.sum(d_o * o, axis=-1)


def _newest_output(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jnp.exp(k @ q / math.sqrt(q.shape[-1]))
    return weights @ v / jnp.sum(weights)


def _weights_under_perplexity(means: jax.Array, counts: jax.Array) -> jax.Array:
    share = counts / jnp.sum(counts)
    return jnp.exp(jnp.sum(share * means)) * share


def _sequence_against_batch(f: jax.Array) -> jax.Array:
    sequences, experts = f.shape
    return experts / sequences * (f - jnp.mean(f, axis=0))


def _volume(z: jax.Array, c: jax.Array) -> jax.Array:
    p = jnp.exp(z) / jnp.sum(jnp.exp(z))
    return c * jnp.max(p) * ((p == jnp.max(p)) - p)


def _parted(z: jax.Array, h: jax.Array, d_y: jax.Array) -> jax.Array:
    g = jnp.exp(z) / jnp.sum(jnp.exp(z))
    d_g = h @ d_y
    return g * (d_g - g @ d_g)


def _softmax(z: jax.Array) -> jax.Array:
    return jnp.exp(z) / jnp.sum(jnp.exp(z))


def _acceptance(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(jnp.minimum(_softmax(u), _softmax(v)))


def _back_through_softmax(d_p: jax.Array, p: jax.Array) -> jax.Array:
    return p * (d_p - jnp.sum(p * d_p))


def _entropy_gradient(z: jax.Array) -> jax.Array:
    p = _softmax(z)
    return _back_through_softmax(jnp.log(p) + 1.0, p)


TRAINING_EXERCISES: dict[str, Exercise] = {
    "10.1": number(
        "Adam, learning rate 0.01, the very first step. The gradient of a weight is -250. By how much does the weight "
        "change?",
        0.01,
        "After one step the corrected mean of g is g, and that of g^2 is g^2. What is g / sqrt(g^2)?",
        "Both running averages are corrected for their start at 0. What is each after one step?",
    ),
    "10.2": function(
        "Another size of a step: the *sum* of the magnitudes of its entries. Write a function of g, [6], that gives "
        "the steepest step of size 1.",
        _one_coordinate,
        [(6,)],
        "All of the sum is best spent where |g| is largest, and nothing elsewhere.",
        "The sum of the magnitudes is given. At which entry does the same magnitude lower the loss most?",
    ),
    "10.3": function(
        "Adafactor with rows alone: the squares v of a gradient g, [3, 4], are fitted by w_ij = r_i. Write a "
        "function of g that gives the r, [3], that are nearest in the divergence, the sum of v log(v / w) - v + "
        "w.",
        _fit_of_rows,
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
    ),
    "11.3": function(
        "A row may look at nothing: P_s = e^(S_s) / (l + e^b), with a learned number b and l the sum of e^(S_s). "
        "So P adds up to 1 - p_b, where p_b = e^b / (l + e^b). Write a function of (p_b, d_o, o), [5], [5, 3] and "
        "[5, 3], that gives each row's part of d_b.",
        _sink_logit,
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
        "K = 1, identical experts. c = <d_y, h> is the same for whatever expert is chosen. Write the gradient of the "
        "logits of one token as a function of (z, c), with z [5].",
        _volume,
        [(5,), ()],
        "The gate is p_s, with s the largest. c p_s ([s = e] - p_e).",
        "Which gate does a token have here? Differentiate it in the chosen logit, then in the others.",
    ),
    "14.3": function(
        "Later the experts have parted: the K chosen ones answer h, [3, 4], with gates g = softmax(z), z [3]. Write a "
        "function of (z, h, d_y), d_y [4], that gives the gradient of z.",
        _parted,
        [(3,), (3, 4), (4,)],
        "d_g = h d_y, one number for each expert. Then the softmax's rule. If all rows of h were equal, it would be 0.",
        "Go back in two steps: from d_y to each gate, and from the gates to the logits.",
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
        _acceptance,
        [(6,), (6,)],
        "The sum over x of q_x min(1, p_x / q_x), which is min(p_x, q_x).",
        "A token is proposed with one probability, and then accepted with another. Add up over all tokens.",
    ),
    "15.3": number(
        "A proposal is accepted with probability 0.8, and a round proposes 4. How many tokens does a round give, on "
        "average?",
        3.3616,
        "1 + a + a^2 + a^3 + a^4.",
        "A round always gives one token. When does it give a second one, and a third?",
    ),
    "16.1": number(
        "E = 8, K = 2, perfect balance. A program takes f as choices per token (it adds up to K). What does its "
        "balance loss give?",
        2.0,
        "f_e = K / E and P_e = 1 / E, for each of the E experts; E times the sum of f P.",
        "At perfect balance all experts are alike. What are f and P of one expert?",
    ),
    "16.2": function(
        "Another importance loss: the shares p = softmax(z) of five experts, and L = ln 5 + sum of p ln p, which "
        "is 0 where all are equal. Write a function of z, [5], that gives dL/dz.",
        _entropy_gradient,
        [(5,)],
        "dL/dp = ln p + 1. The softmax's rule takes the mean out, and the 1 with it: p (ln p - sum of p ln p).",
        "Differentiate in p first. Which rule brings a gradient from p to z?",
    ),
    "16.3": number(
        "Two experts, K = 1, and every token gives p = (0.52, 0.48). The bias begins at 0, and its rate is 0.005. "
        "After how many steps does the choice change for the first time?",
        5.0,
        "Each step moves the two apart by 2 rate = 0.01. The gap is 0.04; at an exact tie the first expert is taken.",
        "By how much does one step move each of the two biases, and in which direction? How large is the gap at first?",
        1e-9,
    ),
}

# %% [markdown]
# # 13. Mean of means
#
# A batch of 64 texts does not fit into memory, so it is cut into eight
# **micro-batches** of eight. Each gives a loss and a gradient. The gradients are added
# up, or **accumulated**, and the optimizer takes one step with the sum. It is said to
# be the same as one large batch, with less memory and more patience. **Is it the
# same?** In 2024 it turned out that several widely used training programs had got it
# wrong ([torchtune #1875](https://github.com/meta-pytorch/torchtune/pull/1875),
# [transformers #34191](https://github.com/huggingface/transformers/pull/34191),
# [transformers #35203](https://github.com/huggingface/transformers/issues/35203)). The
# loss curves had looked fine. The fault is one line long, and this chapter is about
# that line.
#
# The code is `foundation/micro_batches.py`. In the project it is
# `moe_jax/training/step.py` that accumulates, `moe_jax/data/batches.py` that weighs
# tokens, and `moe_jax/model/moe/router.py` that has the balance loss.
#
# ## Step 1: gradients are linear, losses need care
# The gradient of a sum is the sum of the gradients, whatever the functions are. So if
# the loss of the batch is a *sum* of terms, each from one micro-batch,
#
# $$L = L^{(1)} + \dots + L^{(M)},$$
#
# then accumulating gradients is exact. There is nothing to prove about gradients. The
# only question is whether $L$ is such a sum. So this chapter compares *losses*.
#
# ## Step 2: a mean over tokens
# The cross-entropy of a batch is a mean over its predicted tokens. Not every token
# counts: some positions are padding, and in conversations only the answers are scored.
# Let micro-batch $i$ have $n_i$ counted tokens, whose losses add up to $x_i$. The batch
# has
#
# $$L = \frac{x_1 + \dots + x_M}{n_1 + \dots + n_M}.$$
#
# What a program has at hand is the mean of each micro-batch, $x_i / n_i$. The tempting
# line is to average them:
#
# $$\bar L = \frac1M\Bigl(\frac{x_1}{n_1} + \dots + \frac{x_M}{n_M}\Bigr).$$
#
# If all $n_i$ are equal, both are $\sum x_i / (M n)$. If not, they differ. $\bar L$
# gives each *micro-batch* the same say. A token in a micro-batch with few tokens then
# has more weight than one among many. The right weight of a micro-batch's mean is its
# **share** of the tokens:
#
# $$\boxed{\;L = \sum_i \frac{n_i}{n} \cdot \frac{x_i}{n_i}, \qquad n = n_1 + \dots +
# n_M\;}$$
#
# The share needs $n$, the count of *all* micro-batches, before the first one is
# computed. (Or one adds up sums, and divides at the end.) In this project the counts
# are known when the batch is read: each token's loss is multiplied by $M/n$ and summed,
# and the mean over the M sums leaves $1/n$.

# %%
from foundation import micro_batches
from foundation.lessons.notebook import agree, check, jax, jnp, np, pictures, shown
from foundation.losses import IGNORE, cross_entropy_backward, cross_entropy_forward

shown(micro_batches.accumulated_loss_forward, micro_batches.accumulated_loss_backward)

# %%
logits = jax.random.normal(jax.random.key(0), (4, 6, 10))
targets = jax.random.randint(jax.random.key(1), (4, 6), 0, 10)
targets = targets.at[0, 1:].set(IGNORE).at[1, 2:].set(IGNORE)  # two short answers
whole, cache = cross_entropy_forward(logits, targets)
parts, parts_cache = micro_batches.accumulated_loss_forward(logits, targets, 2)
halves = ((logits[:2], targets[:2]), (logits[2:], targets[2:]))
means = [cross_entropy_forward(*half)[0] for half in halves]
counts = [int(jnp.sum(half != IGNORE)) for _, half in halves]
print("counted tokens of the two micro-batches:", counts)
print(f"whole batch {whole:.6f}, mean of means {sum(means) / 2:.6f}")
agree("by shares and whole, the loss", parts, whole, 1e-14)
one = jnp.ones(())
gradient = micro_batches.accumulated_loss_backward(one, parts_cache)
agree("the gradients", gradient, cross_entropy_backward(one, cache), 1e-14)

# %% [markdown]
# ## Step 3: how wrong is the tempting line?
# The mean of means gives a token of micro-batch $i$ the weight $1/(M n_i)$ in place of
# $1/n$. The ratio is $n / (M n_i)$: the average count, divided by its own. So a token
# in a micro-batch of a tenth of the average length shouts ten times too loud. The
# gradient is that of *another* loss, in which short texts matter more. Training with it
# converges, to a model that is good at something slightly different. That is why nobody
# saw it in a curve.
#
# The picture shows 2,000 random batches of two micro-batches, each token's loss drawn
# at random. The more unequal the counts, the farther the mean of means can be off.

# %%
random = np.random.default_rng(0)
spread, off = [], []
for _ in range(2000):
    n = random.integers(4, 200, 2)
    x = [random.exponential(2.5, k) for k in n]
    truth = np.concatenate(x).mean()
    spread.append(float(n.max() / n.min()))
    off.append(float(abs(np.mean([part.mean() for part in x]) / truth - 1)))
edges, spread, off = 2.0 ** np.arange(0, 6), np.array(spread), np.array(off)
inside = [off[(low <= spread) & (spread < 2 * low)] for low in edges]
lines = {
    "mean of means: 1 batch in 10 is farther off": (
        edges,
        [np.quantile(i, 0.9) for i in inside],
    ),
    "mean of means: 1 batch in 2 is farther off": (
        edges,
        [np.median(i) for i in inside],
    ),
    "by shares of the tokens": (edges, [0.0] * len(edges)),
}
ratio = "larger count / smaller count, from the value at the point to twice that"
panel = {"how far off the loss of two micro-batches is": lines}
pictures.curves(panel, ratio, "relative error of the loss", log_x=2, markers=True)
assert np.median(inside[-1]) > np.median(inside[0])

# %% [markdown]
# ## Step 4: the balance loss, by sequence
# A mixture of experts adds a balance loss (chapter 8). For one sequence it is $E\sum_e
# f_e P_e$, with $f_e$ the share of choices that went to expert $e$, and $P_e$ the mean
# probability. Here everything depends on one detail: over *what* are $f$ and $P$ taken?
#
# This project takes them over **one sequence**, and then the mean over sequences. So
# each sequence contributes a number that depends on nothing else in the batch, and
# micro-batches are exact, as long as all have equally many sequences.
#
# ## Step 5: the balance loss, by batch
# Most programs take $f$ and $P$ over the whole batch. Write $\langle\cdot\rangle$ for
# the mean over micro-batches, and $f^{(i)}$, $P^{(i)}$ for what micro-batch $i$ sees.
# If all micro-batches have equally many tokens, the batch has $f = \langle
# f^{(i)}\rangle$ and $P = \langle P^{(i)}\rangle$. The loss is a *product* of the two,
# and a mean of products is not the product of means:
#
# $$\langle f^{(i)} P^{(i)}\rangle = \langle f^{(i)}\rangle\langle P^{(i)}\rangle +
# \operatorname{cov}(f^{(i)}, P^{(i)})$$
#
# where the **covariance** is $\langle (f^{(i)} - f)(P^{(i)} - P)\rangle$. So
#
# $$\boxed{\;L_{\text{parts}} - L_{\text{whole}} = E \sum_e
# \operatorname{cov}(f^{(i)}_e, P^{(i)}_e)\;}$$
#
# It is positive, as a rule: where an expert has a high probability, it is chosen often.
# The more micro-batches, the smaller each one is, the more they differ, and the
# stronger the push towards balance. With this loss, a setting that is meant to save
# memory changes *what is trained*. No weights repair it: the difference contains
# products of different micro-batches, and a weighted sum over micro-batches has none.

# %%
batch, tokens, experts = 16, 32, 8
topic = 1.5 * jax.random.normal(jax.random.key(2), (batch, 1, experts))
router = topic + jax.random.normal(jax.random.key(3), (batch, tokens, experts))
probs = jax.nn.softmax(router)
chosen = jnp.argsort(-probs, axis=-1)[..., :2]
by_sequence, _ = micro_batches.grouped_balance_forward(probs, chosen, batch)
print("micro-batches   by batch   by sequence")
for parts in (1, 2, 4, 8, 16):
    by_batch, _ = micro_batches.grouped_balance_forward(probs, chosen, parts)
    one_by_one = [
        micro_batches.grouped_balance_forward(p, c, batch // parts)[0]
        for p, c in zip(jnp.split(probs, parts), jnp.split(chosen, parts), strict=True)
    ]
    mean = jnp.mean(jnp.stack(one_by_one))
    print(f"{parts:13}   {by_batch:8.4f}   {mean:11.4f}")
    assert abs(mean - by_sequence) < 1e-14
f = jnp.mean(chosen[..., None] == jnp.arange(experts), axis=(1, 2))
P = jnp.mean(probs, axis=1)
covariance = jnp.mean(f * P, 0) - jnp.mean(f, 0) * jnp.mean(P, 0)
gap = micro_batches.balance_gap(probs, chosen, batch)
print(f"gap {gap:.6f}, E x covariance {experts * jnp.sum(covariance):.6f}")
assert abs(gap - experts * jnp.sum(covariance)) < 1e-14

# %% [markdown]
# ## What else is not linear
# Anything between the gradient and the sum must be linear too. **Clipping** shortens a
# gradient that is longer than a limit. Take gradients of length 3 and 4 at a right
# angle. Their mean, clipped at 1, has length 1. Clipped before, it has length 0.71. So
# clip once, after the sum. **Adam** squares gradients: its update comes after the sum.
# **Dropout** and router noise draw random numbers. For the micro-batches to be the
# batch, sequence $i$ must draw the same numbers in both. So its random key is made from
# $i$, its place in the *whole* batch. A test of the project then compares the two.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive accumulated_loss`, then `derive
# grouped_balance`.

# %%
check("13.1", None)

# %%
check("13.2", None)

# %%
check("13.3", None)

# %% [markdown]
# # 4. Softmax and cross-entropy
#
# A language model ends in V numbers for each position, one for each entry of its
# vocabulary. They are called **logits**, and may be any real numbers. Two steps make a
# loss of them. The softmax turns logits into probabilities. The cross-entropy says how
# surprised the model was by what really came. Together they have the best-known
# gradient of the field: $p - \text{onehot}$. The code is `foundation/softmax.py` and
# `foundation/losses.py`.
#
# ## The softmax
# For one row of logits $z$,
#
# $$p_i = \frac{e^{z_i}}{S}, \qquad S = \sum_j e^{z_j}.$$
#
# All $p_i$ are positive, and they add up to 1: a **probability distribution**. A
# constant added to all logits cancels in the quotient. (The code uses this. It
# subtracts the largest logit first, so that no exponential can overflow.)
#
# **Its Jacobian, step by step.** How does $p_i$ change with $z_j$?
#
# 1. $\partial S / \partial z_j = e^{z_j}$, for every $j$.
# 2. The quotient rule, for $i \ne j$, where only $S$ depends on $z_j$: $\;\partial p_i
#    / \partial z_j = -e^{z_i} e^{z_j} / S^2 = -p_i p_j$.
# 3. For $i = j$ the numerator changes too, which adds $e^{z_i} / S = p_i$.
# 4. Together: $J_{ij} = p_i [i = j] - p_i p_j$, where the bracket $[i = j]$ is 1 for $i
#    = j$ and else 0. Or $J = \operatorname{diag}(p) - p\,p^\top$.
#
# The second matrix, $p\,p^\top$, has **rank one**: every row is a multiple of the same
# row $p$. It says that the logits *compete*. Raising one logit takes probability from
# all others, in proportion to what they have.

# %%
from foundation.lessons.notebook import agree, check, jax, jnp, pictures, shown
from foundation.losses import cross_entropy_backward, cross_entropy_forward
from foundation.softmax import logsumexp_backward, softmax_backward, softmax_forward

# %%
z = jnp.array([1.0, 2.5, 0.3, -0.5, 1.4])
p, cache = softmax_forward(z)
first, second = jnp.diag(p), -jnp.outer(p, p)
parts = {"diag(p)": first, "- p pᵀ": second, "their sum, J": first + second}
pictures.heatmaps(parts, "logit j", "probability i", numbers=".3f")

# %% [markdown]
# ## The backward pass
# We never build $J$. For a cotangent $d_p$,
#
# $$(d_z)_j = \sum_i (d_p)_i J_{ij} = p_j (d_p)_j - p_j \sum_i p_i (d_p)_i$$
#
# and the sum is one number for the whole row, the mean of $d_p$ under $p$. So
#
# $$d_z = p \odot (d_p - \langle p, d_p\rangle).$$
#
# In words: an entry is pushed up if its cotangent is above the average, and down if it
# is below, each in proportion to its probability. The entries of $d_z$ add up to 0, as
# they must: adding a constant to all logits changes nothing. A backward pass that
# forgets $\langle p, d_p \rangle$ breaks this.
#
# One cotangent for each row of the identity gives the whole Jacobian:

# %%
shown(softmax_forward, softmax_backward)

# %%
jacobian = jax.vmap(lambda d_p: softmax_backward(d_p, cache))(jnp.eye(5))
agree("by hand and by jax.jacobian", jacobian, jax.jacobian(jax.nn.softmax)(z), 1e-14)
print(f"largest sum of a row {jnp.max(jnp.abs(jacobian.sum(axis=1))):.1e}")

# %% [markdown]
# ## Cross-entropy
# The model gave the true next token $y$ the probability $p_y$. Its loss is $L = -\ln
# p_y$: 0 if it was certain, and large if it was surprised. The unit is the **nat**;
# divided by $\ln 2$ it is bits. Put the softmax in:
#
# $$L = -\ln \frac{e^{z_y}}{S} = \ln S - z_y.$$
#
# $\ln S = \ln \sum_j e^{z_j}$ is called **logsumexp**. Now differentiate, term by term:
#
# 1. $\partial \ln S / \partial z_i = \frac{1}{S}\, e^{z_i} = p_i$. The gradient of
#    logsumexp is the softmax.
# 2. $\partial z_y / \partial z_i = 1$ for $i = y$ and else 0. A vector with a single 1
#    is called **onehot**.
# 3. So $d_z = p - \text{onehot}(y)$.
#
# What the model believed, minus what was true. Over $n$ positions the loss is the mean,
# so each gets $(p - \text{onehot}(y)) / n$. Positions that do not count, such as
# padding, get exactly 0, and are not in $n$ either.

# %%
shown(logsumexp_backward, cross_entropy_forward, cross_entropy_backward)

# %% [markdown]
# ## The gradient is bounded
# However wrong the model is, no entry of $p - \text{onehot}$ is above 1 in size. And
# the push never stops while the model is wrong. It is close to 1 where $p_y$ is close
# to 0.
#
# Compare with the squared error $\frac12 \sum_i (p_i - \text{onehot}_i)^2$. Its
# cotangent is $d_p = p - \text{onehot}$, and this still has to go through the softmax,
# which multiplies by $p$. Where the model is certain and wrong, $p_y \approx 0$ and the
# other factor is nearly equal to its average. So the gradient vanishes just where it is
# needed most.

# %%
wrongness = jnp.linspace(-6.0, 6.0, 200)
logits = jnp.stack([-wrongness, jnp.zeros_like(wrongness)], axis=-1)  # target: class 0


def both_gradients(row):
    _, loss_cache = cross_entropy_forward(row[None], jnp.array([0]))
    d_cross_entropy = cross_entropy_backward(jnp.ones(()), loss_cache)[0, 0]
    q, row_cache = softmax_forward(row)
    d_squared = softmax_backward(q - jnp.array([1.0, 0.0]), row_cache)[0]
    return d_cross_entropy, d_squared


names = ("cross-entropy", "squared error of p")
gradients = zip(names, jax.vmap(both_gradients)(logits), strict=True)
pushes = {name: (wrongness, -gradient) for name, gradient in gradients}
how = "how wrong the logits are (z_other - z_target)"
pictures.curves({"push towards the target": pushes}, how, "- dL / dz_target")

# %% [markdown]
# ## Why the two are derived together
# One could also go in two steps: through $-\ln p_y$, whose cotangent is $-1/p_y$ at $y$
# and 0 elsewhere, and then through the softmax. On paper this is the same:
#
# $$p_j\bigl((d_p)_j - \langle p, d_p\rangle\bigr)
# = p_j \left(-\frac{[j = y]}{p_y} + 1\right) = p_j - [j = y].$$
#
# In a computer it is not. Let the model be wrong by 2000: $z = (0, 2000)$ with $y = 0$.
# Then $p_y = e^{-2000}$ is below the smallest number that float64 can hold, so it is 0.
# $1/p_y$ is infinite, $p_y \cdot (1/p_y)$ is $0 \cdot \infty$, and that is *not a
# number*. One such position makes every parameter NaN at the next step. The joint
# formula never divides by $p_y$. So libraries offer "cross-entropy with logits" and
# advise against taking the logarithm of a softmax.

# %%
extreme = jnp.array([[0.0, 2000.0]])
loss, joint = cross_entropy_forward(extreme, jnp.array([0]))
p, softmax_cache = softmax_forward(extreme)
d_p = jnp.array([[-1.0, 0.0]]) / p  # -1 / p_y at the target
print(f"loss {loss}")
print("joint formula: ", cross_entropy_backward(jnp.ones(()), joint).tolist())
print("in two steps:  ", softmax_backward(d_p, softmax_cache).tolist())

# %% [markdown]
# ## What to take away
# Three things come back later. A softmax passes on a cotangent *minus its average*: in
# attention (chapter 5) and in the gates of a router (chapter 8). Where two steps belong
# together, derive them together: the joint formula is shorter, and safe where the steps
# are not. And a probability that is exactly 0, by a mask, gets a gradient of exactly 0,
# because $p$ is a factor.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive softmax`, then `derive
# cross_entropy`.

# %%
check("4.1", None)

# %%
check("4.2", None)

# %%
check("4.3", None)

# %% [markdown]
# # 10. Where a step comes from
#
# The chapters so far end with a gradient. Training needs a *step*. Adam divides the
# gradient, entry by entry. Adafactor divides by something cheaper. Muon throws away the
# singular values. Tricks that happen to work? All of them follow from one question:
# **which step is the steepest?** The answer depends on what we call the *size* of a
# step, and each of these optimizers has its own idea of size.
#
# The code is `foundation/steepest.py`, `foundation/adafactor.py` and
# `foundation/optimizers.py`. The project trains with the same steps, in
# `moe_jax/training/optimizers/adam.py`, `moe_jax/training/optimizers/adafactor.py` and
# `moe_jax/training/optimizers/muon.py`; a test compares them. (There Muon has no factor
# $\sqrt{\max(1, O/I)}$ for a matrix [I, O].)
#
# ## Step 1: the question
# Let $g$ be the gradient of a weight matrix, and $d$ a step. To first order, the loss
# changes by the inner product $\langle g, d\rangle = \sum_{ij} g_{ij} d_{ij}$. We can
# make that as negative as we like with a huge step. So fix its size, and ask for
#
# $$\min_d\; \langle g, d\rangle \quad\text{where}\quad \lVert d \rVert \le 1.$$
#
# A **norm** $\lVert\cdot\rVert$ is a measure of size: it is positive, grows in
# proportion when $d$ is scaled, and obeys the triangle inequality. There are many. The
# largest value that $\langle g, d \rangle$ can reach under this condition is called
# the **dual norm** of the gradient, $\lVert g\rVert_*$.
#
# ## Step 2: three norms
# **The root of the sum of squares.** The inequality of Cauchy and Schwarz says $\langle
# g, d\rangle \ge -\lVert g\rVert\,\lVert d\rVert$, and $d = -g/\lVert g\rVert$ reaches
# it. This is **gradient descent**.
#
# **The largest entry.** Each entry of $d$ is free in $[-1, 1]$, whatever the others do.
# So each takes the end that helps: $d_{ij} = -\operatorname{sign}(g_{ij})$. All entries
# move by the same amount. This is **sign descent**.
#
# **The largest singular value.** A matrix can be written $g = U S V^\top$, with
# orthonormal columns in $U$ and $V$ and the singular values $s_i \ge 0$ on the diagonal
# of $S$. The largest one of a matrix $d$, its **spectral norm**, says by how much $d$
# can stretch a vector at most. Now
#
# $$\langle g, d\rangle = \operatorname{tr}(V S U^\top d)
# = \operatorname{tr}(S\, R) = \sum_i s_i R_{ii}, \qquad R = U^\top d V.$$
#
# No entry of $R$ is larger than the spectral norm of $d$, so none is below $-1$. The
# best would be $R_{ii} = -1$ for every $i$. And $d = -UV^\top$ reaches that:
#
# $$\boxed{\;d = -\,U V^\top\;}$$
#
# All singular values of the step are 1. Directions in which the gradient is weak move
# as far as those in which it is strong.
#
# ## Step 3: a gradient of a gradient's size
# There is a neat way to check all three. Let $d(g)$ be the step that *maximises*
# $\langle g, d\rangle$. For another gradient $h$ it is allowed but maybe not the best,
# so $\lVert h\rVert_* \ge \langle h, d(g)\rangle$, and for $h = g$ both are equal. So
# the difference, as a function of $h$, has its minimum at $h = g$, where its derivative
# is 0:
#
# $$\frac{\partial \lVert g\rVert_*}{\partial g} = d(g)$$
#
# *The gradient of the dual norm is the steepest step*, up to its sign. So the rows
# `dual_norm` of the table are checked three ways, like every other gradient here. For
# the spectral norm, $\lVert g\rVert_* = \sum_i s_i$.

# %%
from foundation import adafactor, optimizers, steepest
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown

shown(steepest.dual_norm_forward, steepest.steepest_step)

# %%
g = jax.random.normal(jax.random.key(0), (3, 5))
print("size of a step   dual norm      fall  singular values of the step")
for size in steepest.NORMS:
    length, _ = steepest.dual_norm_forward(g, size)
    step = steepest.steepest_step(g, size)
    values = jnp.linalg.svd(step, compute_uv=False)
    fall = jnp.vdot(g, step)
    print(f"{size:<16} {length:9.4f} {fall:9.4f} ", np.round(values, 3))
    assert abs(length + fall) < 1e-12

# %% [markdown]
# ## Step 4: Adam is sign descent with a memory
# Adam keeps a running mean $m$ of the gradients, and $v$ of their squares, and steps by
# $-m/\sqrt v$. Suppose the gradient of a weight is the same in every step. Then $m = g$
# and $v = g^2$, and the step is $-g/|g| = -\operatorname{sign}(g)$: the steepest step
# in the largest-entry norm. Suppose instead that the gradient is pure noise with mean
# 0. Then $m$ is near 0 and $v$ is not, so the step is small. So $m / \sqrt v$ is the
# sign, times a factor that says how far the sign can be trusted: near 1 if the gradient
# is steady, near 0 if it is noise. (The factor can exceed 1 for a while, because $v$
# forgets more slowly than $m$. After many zeros, one large gradient gives 3.2 at rates
# of 0.9 and 0.999.)
#
# Two details. Both means start at 0, so after $t$ steps a constant $g$ gives only
# $(1-\beta^t)\, g$. Adam divides by $1-\beta^t$. This is called **bias correction**.
# And **AdamW** shrinks the weights by a term of its own, $-\eta\lambda w$ with the
# learning rate $\eta$ and a small number $\lambda$, *outside* of the division. A
# penalty $\lambda w^2/2$ in the loss would be inside: it would be divided by $\sqrt v$
# too, so weights with large gradients would be decayed less.


# %%
def path(gradients):
    """The weights after each step of Adam, from 0."""
    weights = [jnp.zeros(4)]
    state = optimizers.adam_init(weights[0])
    for gradient in gradients:
        after, state = optimizers.adam_update(gradient, state, weights[-1], lr=0.1)
        weights.append(after)
    return jnp.array(weights)


steady = path([jnp.array([3.0, -0.001, 0.0, 250.0])] * 3)
print("three steps with constant gradients:", np.round(steady[-1], 6))
noise = path(jax.random.normal(jax.random.key(1), (400, 4)))
size = jnp.mean(jnp.abs(jnp.diff(noise, axis=0))[100:]) / 0.1
print(f"mean step with pure noise: {size:.2f} of the learning rate")
assert size < 0.4

# %% [markdown]
# ## Step 5: Adafactor, or which two vectors
# $v$ is as large as the weights. **Adafactor** keeps one number for each row and one
# for each column, and uses the product $w_{ij} = r_i c_j$ in place of $v_{ij}$. A
# matrix of this form is said to have **rank 1**. Which $r$ and $c$? The nearest ones,
# but again it matters how distance is measured. All entries are positive, so take the
# **divergence**
#
# $$D(v, w) = \sum_{ij} v_{ij} \log\frac{v_{ij}}{w_{ij}} - v_{ij} + w_{ij}.$$
#
# Each term is $v\,(t - 1 - \log t)$ with $t = w/v$, which is 0 at $t = 1$ and positive
# elsewhere. So $D$ is a distance of a kind. It compares *ratios*: being wrong by a
# factor of 2 costs something for a small entry, too. That is what we want, because we
# are about to divide by $\sqrt w$. Now differentiate, with $w_{ij} = r_i c_j$:
#
# $$\frac{\partial D}{\partial r_i} = \sum_j \Bigl(c_j - \frac{v_{ij}}{r_i}\Bigr),
# \qquad
# \frac{\partial D}{\partial c_j} = \sum_i \Bigl(r_i - \frac{v_{ij}}{c_j}\Bigr).$$
#
# Set both to 0: $r_i = (\text{row sum } i)/\sum c$ and $c_j = (\text{column sum }
# j)/\sum r$. Multiply. Since $\sum r \sum c$ is the sum of all $v$,
#
# $$\boxed{\;w_{ij} = \frac{(\text{row sum } i)\,(\text{column sum } j)}
# {\text{sum of all}}\;}$$
#
# No iteration, no decomposition. And sums of running means are running means of sums,
# so the two vectors can be kept *instead* of $v$.

# %%
shown(adafactor.divergence_backward, adafactor.rank_one_fit)

# %%
v = jax.random.normal(jax.random.key(2), (4, 6)) ** 2 + 0.05
fit = adafactor.rank_one_fit(v)
row, column = fit.sum(1) / jnp.sqrt(fit.sum()), fit.sum(0) / jnp.sqrt(fit.sum())
value, cache = adafactor.divergence_forward(row, column, v)
d_row, d_column = adafactor.divergence_backward(jnp.ones(()), cache)
largest = max(jnp.max(jnp.abs(d_row)), jnp.max(jnp.abs(d_column)))
print(f"divergence {value:.4f}; largest gradient at the fit {largest:.1e}")
assert largest < 1e-12
for i in range(3):
    other = row * jnp.exp(0.1 * jax.random.normal(jax.random.key(i), row.shape))
    farther, _ = adafactor.divergence_forward(other, column, v)
    print(f"  rows moved by about 10 %: {farther:.4f}")
    assert farther > value

# %% [markdown]
# ## Step 6: Muon, without a decomposition
# The steepest step in the spectral norm needs $UV^\top$, and a singular value
# decomposition is slow on the machines that train models. **Newton-Schulz** gets there
# with matrix products alone. Take a polynomial with odd powers only,
#
# $$X \leftarrow a X + b\,(XX^\top) X + c\,(XX^\top)^2 X.$$
#
# Put $X = U S V^\top$ in. Since $XX^\top = U S^2 U^\top$, every term is
# $U(\cdot)V^\top$:
#
# $$X \leftarrow U\,(aS + bS^3 + cS^5)\,V^\top.$$
#
# The vectors stay. Each singular value is changed *by itself*, $s \leftarrow as + bs^3
# + cs^5$. We only need numbers $a, b, c$ for which repeating this takes every $s$ in
# $(0, 1]$ near 1. First divide by the root of the sum of squares of all entries: it is
# at least the largest singular value, so all of them start in $(0, 1]$.
#
# **Muon** takes $a = 3.4445$, $b = -4.7750$, $c = 2.0315$, and five steps. The slope at
# 0 is $a$, so a small value grows by 3.4 in each step, and by almost 500 in five. The
# price is seen on the left of the picture: values wander between 0.7 and 1.2. For a
# step that is enough. On the right are singular values of one matrix.

# %%
shown(optimizers.orthogonalize)

# %%
a, b, c = optimizers.NEWTON_SCHULZ
s = jnp.linspace(0.0, 1.0, 400)
after = [s]
for _ in range(5):
    after.append(a * after[-1] + b * after[-1] ** 3 + c * after[-1] ** 5)
mapped = {f"{n} steps": (s, after[n]) for n in (0, 1, 3, 5)}

g = jax.random.normal(jax.random.key(3), (2, 12, 12))
U, V = jnp.linalg.qr(g)[0]
matrix = (U * jnp.logspace(0, -2, 12)) @ V.T
after = jnp.stack([optimizers.orthogonalize(matrix, steps=n) for n in range(6)])
tracks = jnp.linalg.svd(after, compute_uv=False)
panels = {
    "what becomes of a singular value s": mapped,
    "six of twelve values of a matrix, after n steps": {
        f"number {i + 1}": tracks[:, i] for i in (0, 3, 6, 9, 10, 11)
    },
}
pictures.curves(panels, "s (left), n (right)", "singular value", level=1.0)
spans = tracks[:, 0] / tracks[:, -1]
print(f"largest / smallest: {spans[0]:.0f} -> {spans[-1]:.1f}")
assert spans[-1] < 3.0

# %% [markdown]
# ## What the norms are good for
# A weight matrix is there to be multiplied with a vector. If $\lVert
# d\rVert_{\text{spectral}} \le c$, then no input of length 1 sees its output change by
# more than $c$. That is a promise about the *function* that the layer computes. The
# root of the sum of squares is at least the spectral norm, so it makes the same
# promise, with a shorter step. The largest entry promises nothing of the kind: a 32 x
# 32 matrix of ones has a largest entry of 1 and a spectral norm of 32. The cell scales
# three steps so that the loss falls equally to first order, and measures the largest
# change of an output. The spectral step is the gentlest, by construction.
#
# An embedding table is another matter: a token reads one row, and rows are not mixed.
# So Muon leaves tables, and vectors such as biases, to Adam.

# %%
strong = jax.random.normal(jax.random.key(4), (32, 1)) @ jnp.ones((1, 32))
g = strong + jax.random.normal(jax.random.key(5), (32, 32))
print("largest change of an output, for the same fall of the loss:")
changes = {}
for size in steepest.NORMS:
    step = steepest.steepest_step(g, size)
    step = step / -jnp.vdot(g, step)
    changes[size] = float(jnp.linalg.norm(step, ord=2))
    print(f"  {size:<10} {changes[size]:.5f}")
assert min(changes, key=lambda size: changes[size]) == "spectral"

# %% [markdown]
# ## Step 7: a wider model, and the same learning rate? (muP)
# Take $y = xW$ with I inputs, and one token. The gradient of $W$ is $x^\top d_y$, and a
# sign step moves each entry by the learning rate. So the output moves by
#
# $$\boxed{\;\Delta y_o = -\eta \sum_{i=1}^{I} x_i \operatorname{sign}(x_i d_{y_o}) =
# -\eta\,\lVert x\rVert_1 \operatorname{sign}(d_{y_o})\;}$$
#
# All I terms have one sign. At the start they had not: random weights of variance 1/I
# make $y$ about 1, whatever the width. But the *step* adds up like I. A learning rate
# that is right for width 64 is 16 times too large for width 1,024. **muP** (maximal
# update parametrisation) takes $\eta \propto 1/I$ for matrices between wide layers. An
# embedding keeps its rate: a token reads one row, so I is 1. Then the best learning
# rate of a small model can be used for a large one. Three steps of Adam:

# %%
shown(steepest.output_change)


# %%
def moved(width, lr, steps=3):
    """How far the outputs of 16 tokens move."""
    keys = jax.random.split(jax.random.key(width), 3)
    x, wanted = (jax.random.normal(key, (16, width)) for key in keys[:2])
    W = before = jax.random.normal(keys[2], (width, width)) / width**0.5
    state = optimizers.adam_init(W)
    for _ in range(steps):
        W, state = optimizers.adam_update(x.T @ (x @ W - wanted), state, W, lr)
    return float(jnp.sqrt(jnp.mean((x @ (W - before)) ** 2)))


widths = (64, 128, 256, 512, 1_024)
same = [moved(width, 1e-3) for width in widths]
scaled = [moved(width, 1e-3 * 64 / width) for width in widths]
curves = {"one learning rate": (widths, same), "as 1 / width": (widths, scaled)}
panel = {"how far outputs move": curves}
pictures.curves(panel, "width", log=True, log_x=2, markers=True)
for width, plain, mup in zip(widths, same, scaled, strict=True):
    print(f"width {width:>5}: {plain:.3f}, with the scaled rate {mup:.3f}")
assert same[-1] > 6 * same[0]
assert 0.5 < scaled[-1] / scaled[0] < 2

# %% [markdown]
# ## Checked against what?
# A step has no gradient to compare with. So the table holds it against an **oracle**:
# `steepest_step` against the best of all corners of a cube, `rank_one_fit` against an
# iteration from a random start, and Adam, Muon and Adafactor against formulas that look
# at the whole history of gradients at once.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive divergence`.

# %%
check("10.1", None)

# %%
check("10.2", None)

# %%
check("10.3", None)

# %% [markdown]
# # 6. Normalisation and positions
#
# Two parts are missing before we can build a transformer. **Normalisation** brings
# every row to a standard size, whatever the stream has grown to. **Positions** tell
# attention where a token stands. Both have a backward pass with a picture behind it: a
# normalisation takes a direction out of the gradient, a rotation turns it back. The
# code is `foundation/norms.py`, `foundation/positions.py` and
# `foundation/embedding.py`.
#
# ## RMSNorm
# Take one row $x$ of D numbers. Its mean square is $m = \frac1D \sum_j x_j^2$. RMSNorm
# divides the row by the root of it, and multiplies each coordinate by a learned scale:
#
# $$r = (m + \epsilon)^{-1/2}, \qquad n = x\,r, \qquad y = \text{scale} \odot n$$
#
# The tiny $\epsilon$ only prevents a division by 0. **Step by step, backward:**
#
# 1. $y = \text{scale} \odot n$ is elementwise: $d_n = \text{scale} \odot d_y$. Each
#    scale is used in every row, so $d_{\text{scale}}$ is the sum of $d_y \odot n$ over
#    all rows.
# 2. $n_j = x_j r$ is a product, and $r$ depends on *every* $x_i$. So $x_i$ acts in two
#    ways: through its own $n_i$, with the factor $r$, and through $r$, which is in all
#    $n_j$.
# 3. How does $r$ change? $\partial m / \partial x_i = 2 x_i / D$, and $\partial r /
#    \partial m = -\frac12 (m + \epsilon)^{-3/2} = -\frac12 r^3$. Together $\partial r /
#    \partial x_i = -r^3 x_i / D$.
# 4. Sum both ways:
#    $(d_x)_i = r\,(d_n)_i + \sum_j (d_n)_j\, x_j \cdot (-r^3 x_i / D)$.
# 5. Put $x = n / r$ in. Of the three factors $r$ in the second term two cancel:
#
# $$d_x = r\,\bigl(d_n - n \cdot \operatorname{mean}(d_n \odot n)\bigr)$$
#
# Read it: take the part along $n$ out of the gradient, then divide by the size of the
# row.
#
# ## LayerNorm
# LayerNorm subtracts the mean of the row first: $c = x - \operatorname{mean}(x)$, then
# it normalises $c$ as above, and it may add a bias at the end. Subtracting the mean is
# a linear map, the **projection** $M = I - \frac1D \mathbf{1}\mathbf{1}^\top$. Its
# matrix is symmetric, so it is its own adjoint. The gradient therefore goes through
# RMSNorm's rule, and then has *its* mean subtracted. The mean of $n$ is 0, so only the
# first term has one:
#
# $$d_x = r\,\bigl(d_n - \operatorname{mean}(d_n) - n \cdot
# \operatorname{mean}(d_n \odot n)\bigr)$$
#
# In the code $r$ is `rrms` for RMSNorm and `rstd` for LayerNorm.

# %%
from foundation import norms, positions
from foundation.lessons.notebook import agree, check, jax, jnp, pictures, shown

shown(norms.rmsnorm_forward, norms.rmsnorm_backward, norms.layernorm_backward)

# %% [markdown]
# ## What the gradient loses
# There is a reason for the lost terms that needs no calculus. Multiply $x$ by 1.01: $n$
# stays the same (but for $\epsilon$). So the gradient has no part along $x$. Under
# LayerNorm a constant added to the whole row changes nothing either. So the gradient
# has no part along $(1, \dots, 1)$.
#
# The picture holds 200 random rows. For each it shows the **cosine** between the
# gradient and a direction; 0 means a right angle. Both rules are at 0 where they must
# be. The naive one, which treats mean and size of the row as constants, is anywhere.

# %%
x, d_y = (jax.random.normal(jax.random.key(i), (200, 16)) for i in range(2))
ones = jnp.ones(16)
_, cache = norms.layernorm_forward(x, ones, jnp.zeros(16))
d_layernorm, _, _ = norms.layernorm_backward(d_y, cache)
_, cache = norms.rmsnorm_forward(x, ones)
d_rmsnorm, _ = norms.rmsnorm_backward(d_y, cache)
naive = d_y / jnp.std(x, axis=-1, keepdims=True)


def cosine(a, b):
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sort(jnp.sum(a * b, -1) / lengths)


along_row = {"RMSNorm": cosine(d_rmsnorm, x), "naive": cosine(naive, x)}
along_ones = {"LayerNorm": cosine(d_layernorm, ones), "naive": cosine(naive, ones)}
panels = {"cosine with the row": along_row, "cosine with (1, ..., 1)": along_ones}
pictures.curves(panels, "rows, sorted by their cosine", "cosine of d_x")
assert jnp.max(jnp.abs(along_row["RMSNorm"])) < 1e-5
assert jnp.max(jnp.abs(along_ones["LayerNorm"])) < 1e-12

# %% [markdown]
# ## Embedding: a look-up is a matrix product
# The **embedding** is a table with a row of D numbers for each token, and the look-up
# reads rows. It is a product with a onehot matrix, so its backward pass is that matrix
# transposed: *add* each position's gradient to the row that it read. A token that
# occurs three times collects three gradients, and one that does not occur gets exactly
# 0. The bug to avoid is `.set` in place of `.add`: then the last occurrence wins.
#
# ## Why positions are needed
# Shuffle the tokens before position $t$: attention collects the same values with the
# same weights. So one layer cannot tell "dog bites man" from "man bites dog". Something
# must depend on the place. The simple way is a second table, with a row for each
# position, added to the embedding. Its backward pass is a sum over the batch, because
# every sequence uses the same rows.
#
# ## RoPE: positions as rotations
# The way that most models use now is **rotary position embedding**, RoPE. Cut a query
# or key of width A into A/2 pairs: entry $i$ with entry $i + A/2$. Take pair $i$ at
# position $t$ as a point in the plane, and turn it by the angle $t \cdot
# 10000^{-2i/A}$:
#
# $$\begin{pmatrix} y_1 \\ y_2 \end{pmatrix} =
# \begin{pmatrix} \cos\theta & -\sin\theta \\
# \sin\theta & \cos\theta \end{pmatrix} \begin{pmatrix} x_1 \\ x_2 \end{pmatrix}$$
#
# The first pair turns by one radian a position, the last very slowly. What is gained?
# Turning by $t$ and turning back by $s$ is turning by $t - s$. So
#
# $$\langle R_s q, R_t k\rangle = \langle q, R_s^\top R_t k\rangle
# = \langle q, R_{t-s} k\rangle,$$
#
# and a score depends on the *distance* of two positions, not on where they are. Put one
# query vector and one key vector at all positions: their scores are constant along the
# diagonals.

# %%
A, T = 16, 48
q, k = (
    jnp.broadcast_to(jax.random.normal(jax.random.key(i), (A,)), (T, A)) for i in (4, 5)
)
scores = positions.rope_forward(q)[0] @ positions.rope_forward(k)[0].T
for distance in range(1 - T, T):
    diagonal = jnp.diagonal(scores, distance)
    assert jnp.max(jnp.abs(diagonal - diagonal[0])) < 1e-12
corner = {"scores: constant along diagonals": scores[:16, :16]}
pictures.heatmaps(corner, "position of the key", "position of the query", numbers="")
angles = positions.rope_angles(T, A, jnp.dtype("float64"))
cosines = {f"pair {i}": jnp.cos(angles[:, i]) for i in (0, 1, 2, 4)}
pictures.curves({"cosine of each pair's angle": cosines}, xlabel="position")

# %% [markdown]
# **Backward.** A rotation is linear, so $d_x = R^\top d_y$. The transpose of a rotation
# is the rotation by the opposite angle. So the backward pass turns the gradient *back*,
# with the same code and a minus sign. No length changes on the way, forward or
# backward. A bug that turns it the same way twice leaves every length right, and every
# direction wrong: a loss curve would hardly show it.

# %%
shown(positions.rope_forward, positions.rope_backward, positions._rotate)

# %%
x = jax.random.normal(jax.random.key(6), (T, A))
turned_back = positions.rope_backward(*positions.rope_forward(x))
agree("turned and turned back, and where it was", turned_back, x, 1e-14)

# %% [markdown]
# ## Longer texts than in training
# A model was trained on texts of $N$ tokens. What happens at position $4N$? A pair that
# turned many times within $N$ has seen every angle. A pair that turned only half way
# meets angles that it has never seen, and nobody knows what the model does there. Three
# cures change only frequencies, so the backward pass stays as it is:
#
# - **Interpolation**: divide every frequency by the factor $f = 4$. No angle is new.
#   But the first pair told neighbours apart by one radian, and now by a quarter.
# - **Another base** (often called NTK-aware): with base $\cdot f^{A/(A-2)}$ the first
#   pair stays and the last is slowed by exactly $f$: its exponent is $-(A-2)/A$, and
#   $(f^{A/(A-2)})^{-(A-2)/A} = 1/f$. All pairs between are slowed a little.
# - **By turns** (YaRN, Llama 3): count the turns of pair $i$ within $N$, $n_i = N
#   \theta_i / 2\pi$. Pairs with $n_i > 4$ stay. Pairs with $n_i < 1$ have new angles
#   ahead, so they are divided by $f$. Between, a blend:
#
# $$\boxed{\;\theta_i \leftarrow \theta_i\Bigl(\kappa_i + \frac{1 -
# \kappa_i}{f}\Bigr), \qquad \kappa_i = \operatorname{clip}\Bigl(\frac{n_i - 1}{4 - 1},
# 0, 1\Bigr)\;}$$
#
# The picture has the numbers of Llama 3.1 (its `config.json`): A = 128, base 500,000, N
# = 8,192 and f = 8.

# %%
shown(positions.slowed_pairs)

# %%
A, BASE, N, FACTOR = 128, 500_000.0, 8_192, 8.0
by_turns = positions.slowed_pairs(A, FACTOR, N, BASE)
frequencies = positions.rope_angles(2, A, jnp.dtype("float64"), BASE)[1]
wider = BASE * FACTOR ** (A / (A - 2))
by_base = positions.rope_angles(2, A, jnp.dtype("float64"), wider)[1] / frequencies
ways = {
    "interpolation": jnp.full(A // 2, 1 / FACTOR),
    "another base": by_base,
    "by turns": by_turns,
}
pictures.curves({"what each frequency is multiplied by": ways}, xlabel="pair")
meet = {}
for name, factors in {"unchanged": jnp.ones(A // 2), **ways}.items():
    largest, seen = frequencies * factors * N * FACTOR, frequencies * N
    meet[name] = int(jnp.sum((seen < 2 * jnp.pi) & (largest > (1 + 1e-9) * seen)))
    stay = int(jnp.sum(factors == 1))
    print(f"{name:<14} {stay:2} pairs stay, {meet[name]:2} meet new angles")
assert meet["by turns"] == 0
assert by_base[0] == 1.0
assert abs(by_base[-1] * FACTOR - 1) < 1e-12

# %% [markdown]
# ## Exercises
# In the terminal: `uv run python -m foundation derive layernorm` is the classic. Then
# `rope`.

# %%
check("6.1", None)

# %%
check("6.2", None)

# %%
check("6.3", None)

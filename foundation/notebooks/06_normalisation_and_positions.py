# %% [markdown]
# # 6. Normalisation and positions
#
# With $n = x\,r$, $r = (\operatorname{mean}(x^2) + \epsilon)^{-1/2}$ and $d_n = \text{scale} \odot d_y$, RMSNorm has
#
# $$d_x = r\,\bigl(d_n - n \operatorname{mean}(d_n \odot n)\bigr).$$
#
# LayerNorm subtracts the mean first, and that projection is applied to the gradient once more:
#
# $$d_x = r\,\bigl(d_n - \operatorname{mean}(d_n) - n \operatorname{mean}(d_n \odot n)\bigr).$$
#
# Code: `foundation/norms.py`, `foundation/positions.py`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import nnx

from foundation.exercises import ask, check
from foundation.norms import layernorm_backward, layernorm_forward, rmsnorm_backward, rmsnorm_forward
from foundation.positions import rope_angles, rope_backward, rope_forward

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## What the gradient loses
# A normalised row can't change its length, and under LayerNorm not its mean. So the gradient is orthogonal to the row,
# and to the constant direction. Leave a term out and it is not.

# %%
x, d_y = (jax.random.normal(jax.random.key(i), (200, 16)) for i in range(2))
ones = jnp.ones(16)
_, cache = layernorm_forward(x, ones, jnp.zeros(16))
d_ln, _, _ = layernorm_backward(d_y, cache)
_, cache = rmsnorm_forward(x, ones)
d_rms, _ = rmsnorm_backward(d_y, cache)
naive = d_y / jnp.std(x, axis=-1, keepdims=True)  # "the statistics are constants"


def cosine(a, b):
    return jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)


figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained", sharey=True)
bins = jnp.linspace(-0.8, 0.8, 41)
for ax, direction, title in (
    (axes[0], x, "with the row x"),
    (axes[1], jnp.ones_like(x), "with the constant direction"),
):
    for grad, label in ((naive, "statistics as constants"), (d_rms, "RMSNorm"), (d_ln, "LayerNorm")):
        ax.hist(cosine(grad, direction), bins=bins, alpha=0.6, label=label)
    ax.set(title="cosine of d_x " + title, xlabel="cosine", yscale="log")
axes[0].legend(frameon=False, fontsize=9)
axes[0].set_ylabel("rows")
plt.show()

# %% [markdown]
# ## Against Flax

# %%
layer = nnx.LayerNorm(
    16, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
)
by_jax = jax.grad(lambda x: jnp.sum(d_y * layer(x)))(x)
print(f"d_x of LayerNorm: largest difference from jax.grad of Flax's layer {jnp.max(jnp.abs(d_ln - by_jax)):.1e}")
assert jnp.max(jnp.abs(d_ln - by_jax)) < 1e-12

# %% [markdown]
# ## RoPE: positions as rotations
# Pair $i$ of a head turns by $t \cdot 10000^{-2i/A}$ at position $t$. Rotations keep lengths, and
# $\langle R_s q, R_t k\rangle$ depends on $t - s$ alone: the score matrix of one query vector and one key vector, put
# at all positions, is constant along diagonals.

# %%
A, T = 16, 48
q, k = (jnp.broadcast_to(jax.random.normal(jax.random.key(i), (A,)), (T, A)) for i in (4, 5))
scores = rope_forward(q)[0] @ rope_forward(k)[0].T
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
image = left.imshow(scores, cmap="RdBu_r")
left.set(title="scores: constant along diagonals", xlabel="position of the key", ylabel="position of the query")
figure.colorbar(image, ax=left, shrink=0.85)
angles = rope_angles(T, A, jnp.dtype("float64"))
for pair in range(A // 2):
    right.plot(jnp.cos(angles[:, pair]), label=f"pair {pair}", color=plt.cm.viridis(pair / 8))
right.set(title="cosine of each pair's angle", xlabel="position")
right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# The adjoint of a rotation is its inverse: backward turns the gradient back.

# %%
x = jax.random.normal(jax.random.key(6), (T, A))
y, cache = rope_forward(x)
print(f"rotated and rotated back: {jnp.max(jnp.abs(rope_backward(y, cache) - x)):.1e} from where it was")
assert jnp.max(jnp.abs(rope_backward(y, cache) - x)) < 1e-14

# %% [markdown]
# ## Exercises

# %%
ask("6.1")
check("6.1", None)
ask("6.2")
check("6.2", None)

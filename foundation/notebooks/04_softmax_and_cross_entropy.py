# %% [markdown]
# # 4. Softmax and cross-entropy
#
# $p_i = e^{z_i} / \sum_j e^{z_j}$ has the Jacobian $J = \operatorname{diag}(p) - p p^\top$, so
#
# $$d_z = p \odot (d_p - \langle p, d_p \rangle).$$
#
# Cross-entropy is $L = \log \sum_j e^{z_j} - z_y$. The gradient of the first term is $p$, that of the second the unit
# vector: $d_z = p - \text{onehot}(y)$. Code: `foundation/softmax.py`, `foundation/losses.py`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from foundation.exercises import ask, check
from foundation.losses import cross_entropy_backward, cross_entropy_forward
from foundation.softmax import softmax_backward, softmax_forward

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The Jacobian, row by row
# One cotangent per row gives the whole Jacobian. It is symmetric, its rows sum to 0 (a constant added to all logits
# changes nothing), and it is singular for that reason.

# %%
z = jnp.array([1.0, 2.5, 0.3, -0.5, 1.4])
p, cache = softmax_forward(z)
jacobian = jax.vmap(lambda d_p: softmax_backward(d_p, cache))(jnp.eye(5))
by_jax = jax.jacobian(lambda z: jax.nn.softmax(z))(z)
print(f"largest difference from jax.jacobian: {jnp.max(jnp.abs(jacobian - by_jax)):.1e}")
assert jnp.max(jnp.abs(jacobian - by_jax)) < 1e-15
print(f"row sums: {jnp.max(jnp.abs(jacobian.sum(axis=1))):.1e}")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
for ax, (title, matrix) in zip(
    axes, {"diag(p)": jnp.diag(p), "- p pᵀ": -jnp.outer(p, p), "their sum, J": jacobian}.items(), strict=True
):
    ax.imshow(matrix, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    ax.set(title=title, xticks=range(5), yticks=range(5))
    for i in range(5):
        for j in range(5):
            colour = "white" if abs(matrix[i, j]) > 0.3 else "#223"
            ax.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
figure.colorbar(axes[0].images[0], ax=axes, shrink=0.85)
plt.show()

# %% [markdown]
# ## The gradient of the loss is bounded
# However wrong the model is, no entry of $p - \text{onehot}(y)$ exceeds 1. Squared error behind a softmax has no such
# push where it is needed: saturated and wrong, its gradient is 0.

# %%
wrongness = jnp.linspace(-6.0, 6.0, 200)
logits = jnp.stack([-wrongness, jnp.zeros_like(wrongness)], axis=-1)  # the target is class 0


def both_gradients(row):
    _, ce_cache = cross_entropy_forward(row[None], jnp.array([0]))
    d_ce = cross_entropy_backward(jnp.ones(()), ce_cache)[0, 0]
    q, softmax_cache = softmax_forward(row)
    d_mse = softmax_backward(q - jnp.array([1.0, 0.0]), softmax_cache)[0]
    return d_ce, d_mse


d_ce, d_mse = jax.vmap(both_gradients)(logits)
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax.plot(wrongness, -d_ce, label="cross-entropy")
ax.plot(wrongness, -d_mse, label="squared error of the probabilities")
ax.set(xlabel="how wrong the logits are (z_other - z_target)", ylabel="push towards the target")
ax.legend(frameon=False)
ax.grid(alpha=0.25)
plt.show()

# %% [markdown]
# ## Range
# Through $p$, $-\frac{1}{p_y}$ times the softmax Jacobian is $0/0$ at this input. The joint formula is right.

# %%
extreme = jnp.array([[0.0, 2000.0]])
loss, cache = cross_entropy_forward(extreme, jnp.array([0]))
print(f"loss {loss}, gradient {cross_entropy_backward(jnp.ones(()), cache).tolist()}")
print("naive:", (-1.0 / (jnp.exp(extreme) / jnp.exp(extreme).sum()))[0, 0] * 0.0)

# %% [markdown]
# ## Exercises

# %%
ask("4.1")
check("4.1", None)
ask("4.2")
check("4.2", None)

# %% [markdown]
# # 5. Attention
#
# $$S = \frac{q k^\top}{\sqrt{A}}, \qquad P = \operatorname{softmax}(S), \qquad o = P v$$
#
# and backward, from the last line to the first,
#
# $$d_P = d_o v^\top,\quad d_v = P^\top d_o,\quad d_S = P \odot (d_P - \langle P, d_P\rangle_{row}),\quad
# d_q = \frac{d_S\, k}{\sqrt{A}},\quad d_k = \frac{d_S^\top q}{\sqrt{A}}.$$
#
# The code is `foundation/attention.py`; the lesson with a sentence is `foundation/attention_mechanism.py`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from foundation import attention_mechanism as lesson
from foundation.attention import attention_backward, attention_forward, causal_mask
from foundation.exercises import ask, check
from foundation.softmax import softmax_backward

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Which word looks where
# Vectors by hand: articles and verbs ask for animals, animals ask for verbs. The mask removes the future, and each
# row still sums to 1.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
for ax, causal in zip(axes, (False, True), strict=True):
    weights, _ = lesson.one_head(causal)
    ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(6), lesson.WORDS)
    ax.set_yticks(range(6), lesson.WORDS)
    ax.set(title="causal" if causal else "no mask", xlabel="looked at", ylabel="looking")
    for t in range(6):
        for s in range(6):
            if weights[t, s] > 0.005:
                colour = "white" if weights[t, s] > 0.6 else "#223"
                ax.text(s, t, f"{weights[t, s]:.2f}", ha="center", va="center", fontsize=8, color=colour)
figure.colorbar(axes[0].images[0], ax=axes, shrink=0.85)
plt.show()

# %% [markdown]
# ## Where a gradient can go
# Ask for the gradient of one output position, $t = 2$. The mask had no line in the backward pass, and needed none: a
# masked score has $P = 0$, and $d_S$ has the factor $P$.

# %%
q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
_, cache = attention_forward(q, k, v, causal_mask(6))
d_o = jnp.zeros((6, 4)).at[2].set(1.0)
d_q, d_k, d_v = attention_backward(d_o, cache)
by_jax = jax.grad(lambda q, k, v: jnp.sum(d_o * attention_forward(q, k, v, causal_mask(6))[0]), argnums=(0, 1, 2))(
    q, k, v
)
for name, ours, theirs in zip("qkv", (d_q, d_k, d_v), by_jax, strict=True):
    print(f"d_{name}: largest difference from jax.grad {jnp.max(jnp.abs(ours - theirs)):.1e}")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharey=True)
bound = max(float(jnp.max(jnp.abs(g))) for g in (d_q, d_k, d_v))
for ax, name, grad in zip(axes, ("d_q", "d_k", "d_v"), (d_q, d_k, d_v), strict=True):
    ax.imshow(grad, cmap="RdBu_r", vmin=-bound, vmax=bound)
    ax.set(title=name, xlabel="coordinate", xticks=range(4))
axes[0].set_ylabel("position")
figure.colorbar(axes[0].images[0], ax=axes, shrink=0.85)
plt.show()
assert (d_k[3:] == 0.0).all()
assert (d_v[3:] == 0.0).all()

# %% [markdown]
# ## Why the square root
# Independent coordinates of variance 1 give $\langle q, k\rangle$ a variance of $A$. Without $1/\sqrt{A}$ the softmax
# saturates as heads get wider, and a saturated softmax passes next to no gradient.

# %%
widths = [2, 4, 8, 16, 32, 64, 128, 256]
sizes = {"with 1/√A": [], "without": []}
for width in widths:
    q, k = (jax.random.normal(jax.random.key(i), (32, 16, width)) for i in (3, 4))
    v, d_o = (jax.random.normal(jax.random.key(i), (32, 16, 8)) for i in (5, 6))
    for label, factor in (("with 1/√A", 1.0), ("without", width**0.5)):
        _, cache = attention_forward(factor * q, k, v)
        d_scores = softmax_backward(d_o @ jnp.swapaxes(v, -1, -2), cache.softmax)
        sizes[label].append(float(jnp.sqrt(jnp.mean(d_scores**2))))
figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for label, values in sizes.items():
    ax.semilogx(widths, values, "o-", base=2, label=label)
ax.set(xlabel="width of a head, A", ylabel="root mean square of d_S", ylim=(0, None))
ax.legend(frameon=False)
ax.grid(alpha=0.25, which="both")
plt.show()

# %% [markdown]
# ## Against Flax
# The same weights in `flax.nnx.MultiHeadAttention`:

# %%
difference = lesson.difference_from_flax(jax.random.key(0))
print(f"largest difference {difference:.1e}")
assert difference < 1e-12

# %% [markdown]
# ## Exercises

# %%
ask("5.1")
check("5.1", None)
ask("5.2")
check("5.2", None)

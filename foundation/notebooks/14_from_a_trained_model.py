# %% [markdown]
# # 14. From a trained model
#
# A trained model has cost a lot. Two ways of going on begin with *exactly its function*
# and add something that can learn. **Upcycling** makes a mixture of experts of it: each
# expert is a copy of the trained network, behind a random router. **LoRA** leaves every
# matrix as it is and adds a product of two thin ones, which is 0 at first. **What
# learns in the first step, if nothing has changed yet?** In both, one part gets exactly
# nothing, and the other part must move first.
#
# The code is `foundation/upcycling.py` and `foundation/low_rank.py`. The project's
# versions are `moe_jax/training/initial_weights.py` and `moe_jax/model/low_rank.py`.
#
# ## Step 1: copies keep the function
# Let $h(x)$ be the trained network. For a token with chosen experts $S$ and gates
# $g_e$, the layer gives
#
# $$y = \sum_{e \in S} g_e\, h_e(x) = \sum_{e\in S} g_e\, h(x) = h(x),$$
#
# if the gates add up to 1 (K > 1) and nothing is dropped. The loss is the loss that the
# dense model ended with.
#
# ## Step 2: the router gets nothing
# By chapter 8 the gate of an expert gets $d_{g_e} = \langle d_y, h_e\rangle$. All $h_e$
# are equal, so all $d_{g_e}$ are one number $c$. Through the softmax of the chosen
# logits:
#
# $$d_{z_e} = g_e\,\Bigl(d_{g_e} - \sum_{j \in S} g_j d_{g_j}\Bigr)
# = g_e\,\Bigl(c - c\sum_{j\in S} g_j\Bigr) = 0.$$
#
# $$\boxed{\;\text{identical experts, } K > 1, \text{ no drops:}\quad d_z = 0\;}$$
#
# The Jacobian of a softmax removes constants. It is not small, it is zero, whatever the
# task and the tokens. No choice of the router changes the output, so the loss has no
# opinion about it.
#
# ## Step 3: the experts do learn
# Expert $e$ gets from each of its tokens the gate $g_e$ times what the dense network
# would get. Copying has the adjoint "sum". So *together* the copies get the dense
# gradient, and *each* gets a random share of it:
#
# $$\sum_e d_{W_e} = \sum_t \sum_{e \in S_t} g_{te}\,(\dots)_t = \sum_t (\dots)_t
# = d_{W_{\text{dense}}}.$$

# %%
from foundation import low_rank, upcycling
from foundation.feed_forward import feed_forward_backward, feed_forward_forward
from foundation.lessons.notebook import check, jax, jnp, pictures, shown
from foundation.moe import moe_backward, moe_forward

shown(upcycling.upcycled_forward, upcycling.upcycled_backward)

# %%
B, T, D, F, E = 4, 16, 8, 12, 4
keys = jax.random.split(jax.random.key(0), 6)
dense = {
    "w_gate": jax.random.normal(keys[0], (D, F)) / D**0.5,
    "w_in": jax.random.normal(keys[1], (D, F)) / D**0.5,
    "w_out": jax.random.normal(keys[2], (F, D)) / F**0.5,
}
router = jax.random.normal(keys[3], (D, E)) / D**0.5
x, d_y = (jax.random.normal(key, (B, T, D)) for key in keys[4:])

h, cache = feed_forward_forward(x, *dense.values())
_, _, _, d_w_out = feed_forward_backward(d_y, cache)
roomy = float(E)
print("                       |y - h|    router's gradient   sum of the copies")
for name, top_k, factor in (
    ("K = 2, no drops", 2, roomy),
    ("K = 4, no drops", 4, roomy),
    ("K = 1, no drops", 1, roomy),
    ("K = 2, with drops", 2, 0.7),
):
    y, layer = upcycling.upcycled_forward(x, dense, router, top_k, factor)
    _, d_dense, d_router = upcycling.upcycled_backward(d_y, layer)
    arrays = (y - h, d_router, d_dense["w_out"] - d_w_out)
    differs, largest, apart = (jnp.max(jnp.abs(array)) for array in arrays)
    print(f"{name:<20} {differs:9.1e} {largest:16.1e} {apart:18.1e} off")
    assert (largest < 1e-13) == (top_k > 1 and factor == roomy)

# %% [markdown]
# ## Step 4: what breaks it
# **K = 1**, or gates that are not divided: $y$ is $h$ times a number below 1. The
# function is not kept, and $d_{z_e} = c\,p_s([s = e] - p_e)$ teaches only how loud $h$
# should be. **Drops**: a dropped choice has $h_e = 0$, so its $d_{g_e}$ is 0 while the
# others are $c$. That is no constant, and the softmax lets it through. It teaches the
# router to prefer experts with free slots, or to avoid them, by the sign of $c$.
#
# So a router's gradient can be large and still be empty of what a router is for. This
# project refuses to upcycle with K = 1, with undivided gates, and with K = E, where
# every copy would see the same tokens.
#
# ## Step 5: the way out
# The zero is a point of balance, but not a trap. Let the experts part by a small
# amount, $h_e = h + \varepsilon\,\delta_e$. Then
#
# $$d_{g_e} - \sum_j g_j d_{g_j} = \varepsilon\,\Bigl\langle d_y,\;
# \delta_e - \sum_j g_j \delta_j\Bigr\rangle:$$
#
# the router's gradient grows *in proportion* to the distance between the experts. On
# doubly logarithmic axes that is a line with slope 1. For K = 1, and with drops, there
# is a floor: the gradient that is not about the experts.

# %%
copies, _ = upcycling.copy_experts_forward(dense, E)
direction = {}
for i, (name, matrix) in enumerate(copies.items()):
    normal = jax.random.normal(jax.random.key(10 + i), matrix.shape)
    direction[name] = normal / matrix.shape[1] ** 0.5
amounts = [10.0**n for n in range(-7, 1)]
zero = jnp.zeros(())
lines = {}
for name, top_k, factor in (
    ("K = 2, no drops", 2, roomy),
    ("K = 2, with drops", 2, 0.7),
    ("K = 1, no drops", 1, roomy),
):
    sizes = []
    for amount in amounts:
        moved = {n: copies[n] + amount * direction[n] for n in copies}
        _, layer = moe_forward(x, {"router": router, **moved}, top_k, factor)
        _, d_params = moe_backward(d_y, zero, zero, layer)
        sizes.append(float(jnp.sqrt(jnp.mean(d_params["router"] ** 2))))
    lines[name] = (amounts, sizes)
axes = ("how far the experts have parted", "RMS of the router's gradient")
panel = {"what the router learns from": lines}
pictures.curves(panel, *axes, log=True, log_x=10, markers=True)
small, smaller = lines["K = 2, no drops"][1][3], lines["K = 2, no drops"][1][2]
print(f"ten times farther apart: {small / smaller:.3f} times the gradient")
assert abs(small / smaller - 10) < 0.1

# %% [markdown]
# ## Step 6: LoRA, a small matrix beside a large one
# Fine-tuning all of $W$, [D, F], needs its gradient and two moments of Adam: three more
# arrays of that size. LoRA trains two thin matrices instead, $A$, [D, R], and $B$, [R,
# F], with a rank R of 4 to 64:
#
# $$y = xW + s\,(xA)B, \qquad s = \alpha / R.$$
#
# With $u = xA$ it is the linear layer of chapter 2, twice. From the end:
#
# $$\boxed{\;d_B = s\,u^\top d_y, \qquad d_u = s\,d_y B^\top, \qquad d_A = x^\top d_u,
# \qquad d_x = d_y W^\top + d_u A^\top\;}$$
#
# $W$ stays, so $x^\top d_y$, the largest of the products, is never computed. The start
# is $B = 0$ and a random $A$. Then $y = xW$ to the bit, and $d_u = 0$: **$A$ gets
# exactly nothing in the first step**, while $B$ gets $s\,u^\top d_y$. As with the
# router above, one part has to move before the other has a gradient. If both were 0,
# *neither* would ever move. After training, $W + s\,AB$ is one matrix again.
#
# What can it not do? The sum of all steps has at most the rank R. Below, what is wanted
# is a change of $W$ of rank 2. Adapters of rank 2 and more get there, and rank 1
# cannot.

# %%
shown(low_rank.low_rank_forward, low_rank.low_rank_backward)

# %%
D, F = 24, 16
keys = jax.random.split(jax.random.key(1), 5)
W = jax.random.normal(keys[0], (D, F)) / D**0.5
change = jax.random.normal(keys[1], (D, 2)) @ jax.random.normal(keys[2], (2, F)) / D
x = jax.random.normal(keys[3], (256, D))
wanted = x @ (W + change)


def train(rank, steps=400, lr=0.3):
    """Gradient descent on the mean square error, by the boxed lines."""
    A, B = jax.random.normal(keys[4], (D, rank)) / D**0.5, jnp.zeros((rank, F))
    losses = []
    for step in range(steps):
        y, cache = low_rank.low_rank_forward(x, A, B, W, 1.0)
        _, d_A, d_B = low_rank.low_rank_backward((y - wanted) / len(x), cache)
        assert step > 0 or not d_A.any()  # exactly 0 in the first step
        A, B = A - lr * d_A, B - lr * d_B
        losses.append(float(jnp.mean((y - wanted) ** 2)))
    return losses


found = {f"rank {r}: {r * (D + F)} of {D * F} numbers": train(r) for r in (1, 2, 4)}
pictures.curves({"mean square error": found}, xlabel="step", log=True)
for name, losses in found.items():
    print(f"{name:<25} {losses[0]:.4f} -> {losses[-1]:.1e}")

# %% [markdown]
# For a real size: one matrix of 4096 x 4096 has 16.8 million numbers, and its adapters
# of rank 16 have 131,072, or 0.8 %. The project (`moe-jax sft --lora 16`) gives each
# expert an A and a B of its own.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive upcycled`, and `derive low_rank`.
# And a question to think about: Adam divides by the size of the gradient (chapter 10).
# What does it do with a router's gradient that is 0 but for rounding, about $10^{-16}$?
# The answer is in the small number that Adam adds to the divisor.

# %%
check("14.1", None)

# %%
check("14.2", None)

# %%
check("14.3", None)

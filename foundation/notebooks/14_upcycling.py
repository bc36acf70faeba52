# %% [markdown]
# # 14. Upcycling
#
# A trained model without experts exists, and has cost a lot. Can a mixture of experts
# begin where it ended? **Upcycling** does this: each expert starts as a *copy* of the
# trained network, the router starts at random, and training goes on. At the start all
# experts are identical. So it makes no difference where a token is sent. **What does a
# router learn from identical experts?** The answer is *exactly nothing*, under two
# conditions; and each condition, when it is broken, teaches the router something that
# nobody asked for.
#
# The code is `foundation/upcycling.py`, which is chapter 8's layer behind one line of
# copying. The project's version is `moe_jax/training/initial_weights.py`.
#
# ## Step 1: the function stays
# Let $h(x)$ be the trained network. For a token with chosen experts $S$ and gates
# $g_e$, the layer gives
#
# $$y = \sum_{e \in S} g_e\, h_e(x) = \sum_{e\in S} g_e\, h(x) = h(x),$$
#
# because for K > 1 the gates add up to 1. Nothing must be dropped, for a dropped choice
# adds 0 in place of its part. Under these two conditions the upcycled model starts as
# the *same function* as the dense one, to the last digits. Its loss is the loss that
# the dense model ended with.
#
# ## Step 2: the router gets nothing
# Chapter 8 has both lines that we need. The gate of an expert gets
#
# $$d_{g_e} = \langle d_y, h_e\rangle.$$
#
# All $h_e$ are equal, so all $d_{g_e}$ are one number $c = \langle d_y, h\rangle$. Now
# through the softmax of the chosen logits:
#
# $$d_{z_e} = g_e\,\Bigl(d_{g_e} - \sum_{j \in S} g_j d_{g_j}\Bigr)
# = g_e\,\Bigl(c - c\sum_{j\in S} g_j\Bigr) = 0.$$
#
# $$\boxed{\;\text{identical experts, } K > 1, \text{ no drops:}\quad d_z = 0\;}$$
#
# The Jacobian of a softmax removes constants. It does not matter what the task is or
# which tokens came. It is not small, it is zero. That makes sense: no choice of the
# router changes the output, so the loss has no opinion about it.
#
# ## Step 3: the experts do learn
# Expert $e$ gets from each of its tokens the gate $g_e$ times what the dense network
# would get. Copying has the adjoint "sum". So added up over the experts,
#
# $$\sum_e d_{W_e} = \sum_t \sum_{e \in S_t} g_{te}\,(\dots)_t = \sum_t (\dots)_t
# = d_{W_{\text{dense}}}.$$
#
# *Together* the copies get the dense gradient. *Each* gets a random share of it, since
# the router sends them different tokens. So they part, slowly at first.

# %%
from foundation import upcycling
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

h, cache = feed_forward_forward(x, dense["w_gate"], dense["w_in"], dense["w_out"])
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
    differs = jnp.max(jnp.abs(y - h))
    largest = jnp.max(jnp.abs(d_router))
    apart = jnp.max(jnp.abs(d_dense["w_out"] - d_w_out))
    print(f"{name:<20} {differs:9.1e} {largest:16.1e} {apart:18.1e} off")
    nothing = top_k > 1 and factor == roomy
    assert (largest < 1e-13) == nothing

# %% [markdown]
# ## Step 4: what breaks it
# **K = 1.** The gate is $g = p_s$, the probability of the chosen expert, and not 1. So
# $y = p_s h(x)$: the output is *quieter* than the dense one, and the function is not
# kept. Now $d_{z_e} = c\,p_s([s = e] - p_e)$ is not 0. What does it teach? Only how
# loud $h$ should be. It moves $p_s$ up or down, and says nothing about which expert
# would be better.
#
# **Drops.** A dropped choice has $h_e = 0$, so its $d_{g_e}$ is 0 while the others are
# $c$. That is no constant, and the softmax lets it through. It teaches the router to
# prefer experts with free slots, or to avoid them, by the sign of $c$.
#
# **Gates that are not divided.** Some models use $g_e = p_e$ for K > 1 as well. Then
# again $y$ is $h$ times a number below 1, and the router learns about that number.
#
# So a router's gradient at the start can be large and still be empty of what a router
# is for. It is one reason to let upcycled models start with K > 1, divided gates and no
# drops. For upcycling, this project refuses K = 1 and undivided gates. It also
# refuses K = E, where every copy would see the same tokens.
#
# ## Step 5: the way out
# The zero is a point of balance, but not a trap. Let the experts part by a small
# amount, $h_e = h + \varepsilon\,\delta_e$. Then
#
# $$d_{g_e} - \sum_j g_j d_{g_j} = \varepsilon\,\Bigl\langle d_y,\;
# \delta_e - \sum_j g_j \delta_j\Bigr\rangle.$$
#
# The router's gradient grows *in proportion* to the distance between the experts. On
# doubly logarithmic axes that is a line with slope 1, and it has no other source. The
# balance loss of chapter 8 does act from the first step, but it only spreads tokens. So
# for a while the router follows the balance loss and noise, and the experts part by
# accident. Then the router begins to see a difference, sends tokens where they are
# served better, and the experts part faster.
#
# The picture takes identical experts, moves each at random by a given amount, and
# measures. For K = 2 without drops the gradient falls in proportion to the distance,
# without end. For K = 1, and with drops, there is a floor: the gradient that is not
# about the experts.

# %%
copies, _ = upcycling.copy_experts_forward(dense, E)
direction = {
    name: jax.random.normal(jax.random.key(10 + i), matrix.shape)
    / matrix.shape[1] ** 0.5
    for i, (name, matrix) in enumerate(copies.items())
}
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
pictures.curves(
    {"what the router learns from": lines},
    xlabel="how far the experts have parted",
    ylabel="root mean square of the router's gradient",
    log=True,
    log_x=10,
    markers=True,
)
small, smaller = lines["K = 2, no drops"][1][3], lines["K = 2, no drops"][1][2]
print(f"ten times farther apart: {small / smaller:.3f} times the gradient")
assert abs(small / smaller - 10) < 0.1

# %% [markdown]
# ## Exercises
# In the terminal: `uv run python -m foundation derive upcycled`. And a question to
# think about: the optimizer Adam divides by the size of the gradient (chapter 10). What
# does it do with a router's gradient that is 0 but for rounding, about $10^{-16}$? The
# answer is in the small number that Adam adds to the divisor.

# %%
check("14.1", None)

# %%
check("14.2", None)

# %%
check("14.3", None)

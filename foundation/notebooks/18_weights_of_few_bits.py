# %% [markdown]
# # 18. Weights of few bits
#
# To write one token, a model reads every weight that the token uses, and multiplies
# each by one number. The arithmetic is trivial. The reading takes the time. A weight of
# 8 bits is read four times as fast as one of 32. **How few bits does a weight need, and
# which way should it be rounded?** The second question has a surprising answer: often
# not to the nearest.
#
# The code is `foundation/small_weights.py`. The project stores such weights in
# `moe_jax/model/quantized.py`.
#
# ## Step 1: codes and scales
# Store a weight as a whole number, its **code**, times a **scale**:
#
# $$w \approx \text{scale} \cdot \text{code}, \qquad \text{code} \in \{-m, \dots,
# m\}, \qquad \text{scale} = \frac{\max |w|}{m}.$$
#
# With 8 bits $m = 127$, with 4 bits $m = 7$. The largest weight gets the code $\pm m$,
# so nothing is cut off. The nearest code is wrong by at most half a scale.
#
# How many weights share a scale? If it is the whole matrix, its one largest entry makes
# all others coarse. If each **output** has its own scale, an output suffers from its
# own large weights only. With 4 bits that is still too coarse, so each **group** of 32
# inputs of an output gets one. A scale of 16 bits for 32 weights costs half a bit each.
#
# ## Step 2: the product
# The scale of an output is the same for all inputs, so it leaves the sum:
#
# $$y_o = \text{scale}_o \cdot \text{unscaled}_o, \qquad \text{unscaled} = x\,
# \text{codes}. \qquad \boxed{\;d_x = (d_y \odot \text{scale})\, \text{codes}^\top,
# \quad d_{\text{scale}_o} = \sum_t (d_y \odot \text{unscaled})_{to}\;}$$
#
# The product reads the codes, and multiplies by the scale once for each output. Codes
# are whole numbers and have no gradient.

# %%
import itertools

from foundation import small_weights
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown

shown(small_weights.quantize, small_weights.coded_product_backward)

# %%
w = jax.random.normal(jax.random.key(0), (256, 64)).at[7, 3].set(40.0)
for bits, most in ((8, 127), (4, 7)):
    for name, group in (("one for each output", 256), ("one for 32 weights", 32)):
        codes, scale = small_weights.quantize(w, most, group)
        stored = codes * jnp.repeat(scale, group, axis=0)
        error = jnp.sqrt(jnp.mean((stored - w) ** 2, axis=0))
        print(
            f"{bits} bits, {name:<19}: typical error {jnp.median(error):.4f},", end=" "
        )
        print(f"of the output with the large weight {error[3]:.4f}")
assert error[3] < 4.0 * jnp.median(error)

# %% [markdown]
# One weight of 40 among weights of about 1 spoils its output, and with a scale for 32
# weights only its group.
#
# ## Step 3: what should be small?
# Nobody looks at weights. What counts is what comes out. Let $X$, [T, D], be inputs
# that the layer really gets, $w$ the weights of one output and $v$ the stored ones.
# With $H = X^\top X / T$,
#
# $$L = \frac1T\,|X(v-w)|^2 = (v-w)^\top H\,(v-w), \qquad \frac{\partial L}{\partial v}
# = 2H(v-w).$$
#
# If two inputs are nearly equal, their weights matter only through their sum. Round one
# up, and you should round the other down. Rounding to nearest knows nothing of this.
#
# ## Step 4: one weight
# Suppose weight $k$ is stored, and is off by an **error**. The others are still free.
# How should they move? Minimise $d^\top H d$ over all changes $d$ with $d_k =
# \text{error}$. With a multiplier $\mu$ for the condition, the derivative is $2Hd -
# \mu\,\mathbf e_k = 0$. So $d$ is in proportion to column $k$ of the **inverse** of
# $H$, and the condition gives the factor:
#
# $$\boxed{\;d = \text{error} \cdot \frac{\text{inverse}_{:,k}}{\text{inverse}_{kk}},
# \qquad L = \frac{\text{error}^2}{\text{inverse}_{kk}}\;}$$
#
# This rule is from 1993, for weights that are *removed*. Rounding is the same with
# another error.
#
# ## Step 5: one after the other
# Round the weights in turn, and after each let the free ones move. A weight that is
# stored leaves the problem. What is left has the matrix $H$ without row and column $k$.
# Its inverse need not be computed anew. One step of Gaussian elimination gives it:
#
# $$\text{inverse} - \frac{\text{inverse}_{:,k}\,\text{inverse}_{k,:}}
# {\text{inverse}_{kk}}.$$
#
# This is **GPTQ**, for all outputs at once. It is greedy: it never takes back a code.
# Is it good? With 8 weights and two choices for each, up or down, there are 256 ways to
# round. We can try them all.


# %%
shown(small_weights.moved_by_one, small_weights.without, small_weights.gptq)


# %%
def all_ways(w, scale, x):
    """The least output error of the 2^D ways to round each weight up or down."""
    down = np.floor(np.asarray(w / scale))
    ways = np.array(list(itertools.product((0, 1), repeat=len(down))))
    codes = np.clip(down + ways, -7, 7)  # 4 bits have no other codes
    errors = np.asarray(x) @ (codes * scale - np.asarray(w)).T
    return np.min(np.mean(errors**2, axis=0))


costs = {"to nearest": [], "GPTQ": [], "best of 256": []}
for seed in range(40):
    keys = jax.random.split(jax.random.key(seed), 3)
    common = jax.random.normal(keys[0], (200, 1))
    x = common + 0.5 * jax.random.normal(keys[1], (200, 8))
    w = jax.random.normal(keys[2], (8, 1))
    codes, scale = small_weights.quantize(w, 7, 8)
    better = small_weights.gptq(w, small_weights.inverse_of_inputs(x, 0.0), scale[0], 7)
    for name, code in (("to nearest", codes), ("GPTQ", better)):
        cost, _ = small_weights.output_error_forward(code * scale, w, x)
        costs[name].append(float(cost))
    costs["best of 256"].append(all_ways(w[:, 0], float(scale[0, 0]), x))
order = np.argsort(costs["to nearest"])
lines = {name: np.asarray(cost)[order] for name, cost in costs.items()}
axes = ("outputs, sorted by the error of rounding to nearest", "error of the output, L")
pictures.curves({"40 outputs, 4 bits, 8 inputs": lines}, *axes)
means = {name: np.mean(cost) for name, cost in costs.items()}
print({name: round(float(mean), 4) for name, mean in means.items()})
assert means["best of 256"] < means["GPTQ"] < means["to nearest"]

# %% [markdown]
# The inputs have much in common here, as they do in a trained network. So errors can
# cancel, and the nearest code is seldom the best one. GPTQ gets most of what there is
# to get, at the price of one pass.
#
# ## Step 6: an expert sees few tokens
# $H$ is made of $T$ tokens, so its rank is at most $T$. A layer that every token passes
# has enough of them. An **expert** gets only its share. If it has seen fewer tokens
# than it has inputs, $H$ has no inverse: in some directions no token says anything, and
# there the rule divides by zero. The cure is to add a small multiple of the identity to
# $H$. It says: where the tokens do not care, stay where you are.

# %%
x = jax.random.normal(jax.random.key(1), (5, 8))
print("rank of H for 5 tokens and 8 inputs:", jnp.linalg.matrix_rank(x.T @ x))
inverse = small_weights.inverse_of_inputs(x, 0.01)
d, cost = small_weights.moved_by_one(inverse, 0, jnp.array(0.1))
print(f"with damping: the others move by at most {jnp.max(jnp.abs(d[1:])):.3f},")
print(f"and the outputs by {jnp.sqrt(jnp.mean((x @ d) ** 2)):.4f}")
print(f"without help they would move by {0.1 * jnp.sqrt(jnp.mean(x[:, 0] ** 2)):.4f}")
assert jnp.all(jnp.isfinite(d))

# %% [markdown]
# ## The answer
# 8 bits are enough with one scale for each output. 4 bits need a scale for each group.
# And round so that the *outputs* stay: what a weight does wrong, the weights beside it
# can put right, as far as their inputs have something in common.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive coded_product`.

# %%
check("18.1", None)

# %%
check("18.2", None)

# %%
check("18.3", None)

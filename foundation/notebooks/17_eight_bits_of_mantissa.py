# %% [markdown]
# # 17. Eight bits of mantissa
#
# Training in 16 bits takes half the memory and, on the right processor, half the time.
# It also has a failure that no gradient check can see. Every gradient is right, every
# step points downhill, and the weights stay exactly where they are. **Why can a small
# step vanish, and what makes it count after all?**
#
# The code is `foundation/rounding.py`. The project uses it in
# `moe_jax/model/precision.py` (weights stored in bfloat16) and in
# `moe_jax/training/state.py` (the scale of the loss in float16).
#
# ## Step 1: what a float is
# A float32 has 32 bits. One is the **sign**. Eight are the **exponent** $e$. The other
# 23 are the **mantissa**: the digits after the leading 1, which is not stored. The
# number is $\pm 1.\text{digits} \times 2^e$.
#
# A **bfloat16** is the upper half of a float32. The exponent is whole, so it reaches as
# far, from $10^{-38}$ to $10^{38}$. Of the mantissa only 7 bits are left, 8 with the
# leading 1. From $2^e$ to $2^{e+1}$ there are $2^7$ numbers, evenly spaced:
#
# $$s = 2^{e-7}.$$
#
# Between 1 and 2 the **spacing** is 0.0078. There is no bfloat16 between 1 and 1.0078.
#
# ## Step 2: to nearest
# The usual rule takes the nearest number, and of two equally near the **even** one,
# whose last bit is 0. There is a pretty way to compute it. Read the 32 bits as a whole
# number. Patterns of one sign are in the order of their size. Neighbours in bfloat16
# differ by 1 in the upper half, *also* where the exponent changes. So rounding up is
# adding 1 to the upper half, and a **carry** can do it. Add `0x7FFF` to the lower half,
# and 1 more where the upper half is odd. The sum carries exactly when it should.
#
# Now take a weight $w$ and a step $d$. Let $s$ be the spacing *on the side of the
# step*: below a power of two it is half of what it is above. If $|d| < s/2$, the
# nearest number to $w + d$ is $w$. The step is gone, and so is the next one. Because $s
# \ge 2^{-8}\,|w|$, this happens to every step below $|w|/512$. A thousandth of the
# weight is such a step. The first two lines below are steps of 0.003, down and up from
# 1: only the one down is taken.

# %%
from foundation import rounding
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown

shown(rounding.nearest_bits, rounding.drawn_bits)

# %%
for x in (0.997, 1.003, 1.0, 1.0039, 1.00391, 1.5):
    bits = rounding.bits_of(jnp.array(x))
    pattern = f"{int(bits):032b}"
    fields = f"{pattern[0]} {pattern[1:9]} {pattern[9:16]}|{pattern[16:]}"
    nearest = float(rounding.value_of(rounding.nearest_bits(bits)))
    print(f"{x:<8} {fields} -> {nearest}")

# %% [markdown]
# The bar shows where the bits are cut. 1.0039 is just below the middle of the two
# neighbours and 1.00391 is just above.
#
# ## Step 3: by a draw
# Add a random number $r$ from $0$ to $2^{16}-1$ instead, and cut. Of the $2^{16}$
# possible $r$, the sum carries for as many as the lower half says. So $x$ goes up with
# the probability
#
# $$f = \frac{\text{lower half}}{2^{16}} = \frac{x - \text{down}}{s},$$
#
# its distance from the lower neighbour in units of the spacing. The mean is
#
# $$\mathbb E[\text{rounded}] = (1-f)\,\text{down} + f\,(\text{down} + s)
# = \text{down} + f s = x. \qquad\boxed{\;\mathbb E[\text{rounded } x] = x\;}$$
#
# This is called **stochastic rounding**. It is **unbiased**, right on average, but not
# more exact: a single step is either lost or far too large. Errors of many steps
# cancel. After $n$ steps the weight has moved by $n f s$, give or take $s\sqrt{n f
# (1-f)}$, and the first grows faster. There are only 65,536 draws, so we can take them
# all:

# %%
x = jnp.asarray(np.array([1.003, 0.99999, -2.9, 3e-8], np.float32)).astype(jnp.float64)
print("mean over all draws minus x:", rounding.mean_of_draws(x) - x)
assert np.array_equal(rounding.mean_of_draws(x), x)

STEPS, STEP = 2000, 0.0005
key = jax.random.key(1)


def train(w, rule):
    """The weight after each of the small steps, by a rule of rounding."""
    path = []
    for n in range(STEPS):
        w = rule(w + STEP, jax.random.fold_in(key, n))
        path.append(w)
    return np.stack(path)


def to_nearest(w, key):
    return rounding.value_of(rounding.nearest_bits(rounding.bits_of(w)))


def by_draw(w, key):
    draw = jax.random.bits(key, w.shape, jnp.uint16).astype(jnp.uint32)
    return rounding.value_of(rounding.drawn_bits(rounding.bits_of(w), draw))


nearest = train(jnp.ones(1), jax.jit(to_nearest))
drawn = train(jnp.ones(1024), jax.jit(by_draw))
lines = {
    "exact": 1.0 + STEP * np.arange(1, STEPS + 1),
    "to nearest": nearest[:, 0],
    "by a draw": drawn[:, 0],
    "by a draw, mean of 1,024": drawn.mean(axis=1),
}
pictures.curves({"one weight, 2,000 steps of 0.0005": lines}, "step", "weight")
print("exact 2.0, to nearest", nearest[-1, 0], "by a draw", drawn[-1].mean())
assert nearest[-1, 0] == 1.0
assert abs(drawn[-1].mean() - 2.0) < 0.01

# %% [markdown]
# Rounded to nearest, the weight never leaves 1. Rounded by a draw it walks with the
# exact line, and the mean of 1,024 such weights lies on it. So the project stores
# weights in bfloat16 only together with this rule.
#
# ## Step 4: long sums
# The same failure sits inside a matrix product. A product is a sum of many terms. If
# the running sum is kept in bfloat16, it stops growing when the next term is below half
# its spacing. Add 1 again and again: at 256 the spacing is 2, and 256 + 1 is a tie,
# which goes to the even neighbour, 256. **The sum of a million ones is 256.** So
# hardware multiplies numbers of 16 bits but adds in float32, and the project asks for
# that wherever it sums.

# %%
ones = rounding.running_sum(jnp.ones(1000))
for terms in (100, 256, 300, 1000):
    print(f"the sum of {terms} ones is {ones[terms - 1]:.0f}")
assert ones[-1] == 256.0

# %% [markdown]
# ## Step 5: too few exponents
# The other 16-bit type, **float16**, divides its bits differently: 11 bits of mantissa,
# but only 5 of exponent. It is finer, and it does not reach as far. Below $2^{-14}$ the
# spacing stops shrinking and stays at $2^{-24}$, so small numbers lose their digits one
# by one. Below $2^{-25}$ they are 0. Gradients are often that small.
#
# The cure is to multiply the *loss* by a number $S$. By the chain rule, every gradient
# in the backward pass is multiplied by $S$, and is large enough to keep its digits.
# Divide by $S$ at the end. If $S$ is a power of two, only the exponent changes, and the
# digits that are kept are the same. The scale cancels **exactly**:
#
# $$\operatorname{round}(2^k g)\,/\,2^k = g \text{ rounded to 11 bits},$$
#
# as long as $2^k |g|$ is at least $2^{-14}$ and at most 65504, the largest float16.
# (Below, the first gradient is still too small at the scale 1024.) Above 65504 the
# gradient is infinite, the step is skipped and the scale is halved. With $S = 1000$ the
# digits would change.

# %%
g = jnp.asarray([3e-8, 1e-6, 1.2345e-3])
print("float16 alone:  ", rounding.to_float16(g))
for scale in (2.0**10, 2.0**20, 1000.0):
    print(f"scale {scale:<10.0f}", rounding.through_scale(g, jnp.array(scale)))
whole = rounding.through_scale(g[2], jnp.array(1.0))
assert rounding.through_scale(g[2], jnp.array(2.0**20)) == whole
assert rounding.through_scale(g[2], jnp.array(1000.0)) != whole

# %% [markdown]
# ## The answer
# A step vanishes below half the spacing of the number that it is added to. A random
# rule makes it count on average, a wider type in sums, and a power of two moves small
# gradients to where the spacing is fine enough.
#
# ## Exercises

# %%
check("17.1", None)

# %%
check("17.2", None)

# %%
check("17.3", None)

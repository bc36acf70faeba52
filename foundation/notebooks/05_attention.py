# %% [markdown]
# # 5. Attention
#
# So far every position is on its own. Attention is the step in which positions read
# from each other: two matrix products with a softmax between them. After chapters 2 and
# 4 its backward pass holds no surprise. Two questions remain. Why does the mask, which
# hides the future, need no line of its own? And why is there a square root? The code is
# `foundation/attention.py`.
#
# ## Queries, keys, values
# Each position $t$ makes three vectors of A numbers from what it knows. Its **query**
# $q_t$ says what it is looking for. Its **key** $k_t$ says what it has to offer. Its
# **value** $v_t$ is what it hands out. Position $t$ compares its query with the key of
# every position $s$ by an inner product, makes weights of the results by a softmax, and
# collects the values with these weights:
#
# $$S_{ts} = \frac{\langle q_t, k_s\rangle}{\sqrt A}, \qquad
# P_{t\cdot} = \operatorname{softmax}(S_{t\cdot}), \qquad
# o_t = \sum_s P_{ts}\, v_s$$
#
# As matrices: $S = qk^\top/\sqrt A$, $\;P = \operatorname{softmax}(S)$ row by row, $\;o
# = Pv$. $S$ is called the **scores**. In a model that predicts the next token, position
# $t$ must not look at $s > t$. So these scores are set to $-\infty$ before the softmax,
# which makes their weight $e^{-\infty} = 0$. This is the **causal mask**.
#
# Here are vectors chosen by hand, three numbers for each word: is it an article, an
# animal, a verb? Articles and verbs ask for animals, animals ask for verbs. Follow one
# score: "saw" asks with $q = (0, 3, 0)$, "cat" answers with $k = (0, 1, 0)$, and the
# score is $3 / \sqrt 3 = 1.73$.

# %%
from foundation import attention
from foundation.lessons.notebook import agree, check, jax, jnp, pictures, shown

words = ("the", "cat", "saw", "the", "dog", "run")
k = v = jnp.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0.2], [0, 0, 1.0]]
)
q = k @ jnp.array([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [0.0, 3.0, 0.0]])
looks = {}
for name, mask in (("no mask", None), ("causal", attention.causal_mask(6))):
    _, (_, _, _, looks[name], *_) = attention.attention_forward(q, k, v, mask)
pictures.heatmaps(looks, "looked at", "looking", words, words, diverging=False)

# %% [markdown]
# ## The backward pass, in five steps
# We know $d_o$. Go through the three lines from the end.
#
# **Step 1: $o = Pv$ is a matrix product**, and chapter 2 has its rule. Each factor gets
# the cotangent times the other factor, transposed:
#
# $$d_P = d_o\, v^\top, \qquad d_v = P^\top d_o$$
#
# Read the second as a sentence: value $s$ was read by position $t$ with weight
# $P_{ts}$, so it collects $P_{ts}\, (d_o)_t$ over all $t$.
#
# **Step 2: $P = \operatorname{softmax}(S)$**, row by row, is chapter 4:
#
# $$d_S = P \odot (d_P - \langle P, d_P\rangle_{\text{row}})$$
#
# **Step 3: $S = q k^\top / \sqrt A$** is a product again, with a constant in front.
# Write one entry: $S_{ts} = \frac{1}{\sqrt A} \sum_a q_{ta} k_{sa}$. The entry $q_{ta}$
# is in $S_{ts}$ for every $s$, with the factor $k_{sa} / \sqrt A$. So
#
# $$d_q = \frac{d_S\, k}{\sqrt A}$$
#
# **Step 4**: $k_{sa}$ is in $S_{ts}$ for every $t$, with the factor $q_{ta} / \sqrt A$.
# The sum now runs over the *first* index of $d_S$, so it is transposed:
#
# $$d_k = \frac{d_S^\top q}{\sqrt A}$$
#
# **Step 5: the mask.** There is no step 5. A masked score has $P_{ts} = 0$, exactly.
# And $d_S$ has the factor $P$. So $(d_S)_{ts} = 0$, exactly, and nothing flows to a key
# of the future. $d_v = P^\top d_o$ has the same factor. The zero of the forward pass
# protects the backward pass.
#
# In the code $d_P$ is `d_p`, $d_S / \sqrt A$ is `d_scores`, and `kept` is $P$ after
# dropout, which switches off random weights while a model is trained. Without it they
# are equal.

# %%
shown(attention.attention_forward, attention.attention_backward)

# %% [markdown]
# To see what the mask does, ask for the gradient of one output position, $t = 2$. Its
# cotangent is random (chapter 0 says why not ones); the cotangents of all other
# positions are 0.

# %%
q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
_, cache = attention.attention_forward(q, k, v, attention.causal_mask(6))
d_o = jnp.zeros((6, 4)).at[2].set(jax.random.normal(jax.random.key(3), (4,)))
by_hand = attention.attention_backward(d_o, cache)


def scalar(q, k, v):
    o, _ = attention.attention_forward(q, k, v, attention.causal_mask(6))
    return jnp.vdot(d_o, o)


by_jax = jax.grad(scalar, argnums=(0, 1, 2))(q, k, v)
agree("by hand and by jax.grad", by_hand, by_jax, 1e-12)
d_q, d_k, d_v = by_hand
panels = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
pictures.heatmaps(panels, "coordinate", "position", numbers=".3f")
assert all((panels[name][3:] == 0.0).all() for name in ("d_k", "d_v"))

# %% [markdown]
# Only the query of position 2 gets a gradient: only it asked. Keys and values of
# positions 0 to 2 do, because they were looked at. Positions 3 to 5 are the future.
#
# ## Why the square root
# Let the coordinates of $q$ and $k$ be independent, with mean 0 and variance 1. Then
# $\langle q, k\rangle$ is a sum of A products, each of variance 1. So it has variance
# A, and a typical size of $\sqrt A$. For A = 64 a typical score would be 8 above or
# below 0, and $e^8 = 2981$: one weight is nearly 1, the others nearly 0. The softmax is
# **saturated**, and $d_S = P \odot (d_P - \langle P, d_P\rangle)$ is tiny almost
# everywhere. Where $P$ is nearly 0, the first factor is. Where $P$ is nearly 1, $d_P$
# is nearly its own average, so the second factor is. Dividing by $\sqrt A$ keeps the
# scores at variance 1, for every width.
#
# The picture shows the *median* size of an entry of $d_S$. Without the root it falls
# from $6 \cdot 10^{-2}$ at A = 2 to about $10^{-12}$ at A = 256. (A mean square would
# hide this. It falls only from 0.21 to 0.13, because it is made by the few rows in
# which two scores happen to be close.)

# %%
widths = [2, 4, 8, 16, 32, 64, 128, 256]
sizes = {"with 1/√A": [], "without": []}
for width in widths:
    q, k = (jax.random.normal(jax.random.key(i), (32, 16, width)) for i in (3, 4))
    v, d_o = (jax.random.normal(jax.random.key(i), (32, 16, 8)) for i in (5, 6))
    for label, factor in (("with 1/√A", 1.0), ("without", width**0.5)):
        _, (*_, softmax, _) = attention.attention_forward(factor * q, k, v)
        d_S = attention.softmax_backward(d_o @ jnp.swapaxes(v, -1, -2), softmax)
        sizes[label].append(float(jnp.median(jnp.abs(d_S))))
medians = {"the gradient of the scores": {n: (widths, s) for n, s in sizes.items()}}
axes = ("width of a head, A", "median of |d_S|")
pictures.curves(medians, *axes, log=True, log_x=2, markers=True)
print(f"without the root: {sizes['without'][0]:.0e} -> {sizes['without'][-1]:.0e}")
assert sizes["without"][-1] < 1e-8

# %% [markdown]
# ## Many heads
# One head has one pattern of weights. A model uses H of them side by side, each of
# width A = D / H, with queries, keys and values of its own. One affine map makes all of
# them at once: [D] to [3 D], split into $q$, $k$, $v$, and each of these split into
# heads. After attention the heads are put side by side again, and a last affine map
# mixes them.
#
# Backward, putting side by side and splitting are each other's adjoints, and the affine
# maps are chapter 2. Newer models share keys and values: several query heads read *one*
# key head. Sharing is copying, and the adjoint of copying is a sum, so the key head
# gets the sum of its group's gradients (`foundation/grouped_heads.py`).
#
# ## A bias that nothing depends on, unless keys turn
# A small puzzle to end with. Let the keys have a bias: $k_s = x_s W_k + b$. It adds
# $\langle q_t, b\rangle / \sqrt A$ to every score of row $t$: the same number for all
# $s$. The softmax ignores a constant, so *the gradient of a key bias is 0*. (Rounding
# leaves $10^{-15}$.) But if positions enter as rotations, as in the next chapter, then
# key $s$ is turned by an angle that depends on $s$, and its bias with it. The shift is
# no longer constant along the row, and the bias matters like any other parameter:

# %%
params = {
    "qkv": {
        "kernel": jax.random.normal(jax.random.key(0), (8, 24)),
        "bias": jax.random.normal(jax.random.key(1), (24,)),
    },
    "out": {"kernel": jax.random.normal(jax.random.key(2), (8, 8))},
}
x, d_y = (jax.random.normal(jax.random.key(i), (2, 5, 8)) for i in (3, 4))
for rotary in (False, True):
    _, cache = attention.multi_head_forward(x, params, 2, rotary)
    _, d_params = attention.multi_head_backward(d_y, cache)
    largest = jnp.max(jnp.abs(d_params["qkv"]["bias"][8:16]))
    print(f"rotated keys: {rotary!s:<5}  largest gradient of the bias {largest:.1e}")

# %% [markdown]
# ## Exercises
# In the terminal: `uv run python -m foundation derive attention`. Then break a line of
# `attention_backward`, and run `uv run python -m foundation attention`.

# %%
check("5.1", None)

# %%
check("5.2", None)

# %%
check("5.3", None)

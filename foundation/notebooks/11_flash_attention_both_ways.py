# %% [markdown]
# # 11. Flash attention, both ways
#
# Attention over T positions makes a T x T matrix of weights for each head. For T = 4096
# these are 16.8 million numbers, for one head of one layer of one text, and chapter 5
# keeps them for the backward pass. Yet the inputs and the output have only T rows of A
# numbers. **Must the matrix exist?** It need not. Cut it into **tiles**, small groups
# of keys; each tile is computed, used, and forgotten, forward and backward. The result
# is the same to the last digits. This is the idea of **FlashAttention**.
#
# The code is `foundation/flash_attention.py`. The project's own attention,
# `moe_jax/model/kernels/causal_attention.py`, has a form `recomputed` with the backward
# pass of steps 4 and 5. It works with whole rows of weights, for one block of queries
# after another, so it does not need the merge of steps 1 to 3. A test compares the two.
#
# ## Step 1: what one tile can say
# Take one query. Its scores are $S_1, \dots, S_T$, and its answer is
#
# $$o = \frac{\sum_s e^{S_s} v_s}{\sum_s e^{S_s}}.$$
#
# Both sums can be collected tile by tile. But $e^{S}$ overflows: a float32 ends at
# $e^{88}$. The usual cure is to subtract the largest score $m$ of the row, which
# cancels in the fraction. But the largest score of the *row* is not known before the
# last tile. So each tile subtracts its own. For a set of keys, keep three things:
#
# $$m = \max_s S_s, \qquad l = \sum_s e^{S_s - m}, \qquad
# \tilde o = \sum_s e^{S_s - m}\, v_s.$$
#
# $\tilde o / l$ is the answer as if there were no other keys.
#
# ## Step 2: the merge
# Two sets of keys, $(m_1, l_1, \tilde o_1)$ and $(m_2, l_2, \tilde o_2)$. The larger of
# $m_1$ and $m_2$ is the $m$ of both. And $l_1$ was a sum of $e^{S - m_1}$. To make it a
# sum of $e^{S - m}$, multiply by $e^{m_1 - m}$:
#
# $$\boxed{\;m = \max(m_1, m_2), \quad
# l = e^{m_1 - m} l_1 + e^{m_2 - m} l_2, \quad
# \tilde o = e^{m_1 - m} \tilde o_1 + e^{m_2 - m} \tilde o_2\;}$$
#
# Both factors are at most 1, and one of them *is* 1. So nothing overflows. The planted
# bug for this step forgets the factor of the old $\tilde o$. It is a nasty one: as long
# as the first tile holds the largest score, the factor is 1 and nobody notices.
#
# ## Step 3: any tiles, any order
# The merge is **associative** and **commutative**: the result for a set of keys does
# not depend on how it was cut, or in which order the pieces came. It must be so, since
# $m$, $l$ and $\tilde o$ are functions of the *set*. And a tile in which this query
# sees nothing, because all its keys are in the future, is $(-\infty, 0, 0)$: it changes
# nothing. Start from there, merge tile after tile, and divide once, at the end. (In the
# code the running $l$ of a row is `total`.)

# %%
from foundation import flash_attention as flash
from foundation.attention import attention_backward, attention_forward, causal_mask
from foundation.lessons.notebook import agree, check, jax, jnp, pictures, shown

shown(flash.part_of_tile, flash.merge_parts)


# %%
def by_tiles(scores, v, size):
    """(m, l, answer so far) after each tile of one row."""
    part = (jnp.full(1, -jnp.inf), jnp.zeros(1), jnp.zeros((1, 3)))
    for first in range(0, len(v), size):
        here = slice(first, first + size)
        tile = flash.part_of_tile(scores[:, here], v[here], None, 0.0)
        part = m, total, o = flash.merge_parts(*part, *tile)
        yield m[0], total[0], o[0] / total


scores = 3.0 * jax.random.normal(jax.random.key(0), (1, 24))
v = jax.random.normal(jax.random.key(1), (24, 3))
print("tile      m        l      answer so far")
steps = list(by_tiles(scores, v, 6))
for n, (m, total, answer) in enumerate(steps):
    print(f"{n:4} {m:8.3f} {total:8.3f}     ", jnp.round(answer, 4))
(whole,) = jax.nn.softmax(scores) @ v
agree("the last answer, and the softmax of the whole row", steps[-1][2], whole, 1e-14)

keys = [int(i) for i in jax.random.permutation(jax.random.key(2), 24)]
shuffled = (tuple(keys[:1]), tuple(keys[1:15]), tuple(keys[15:]))
(mixed,) = flash.merged_output(scores, v, shuffled)
agree("keys shuffled, in tiles of 1, 14 and 9", mixed, whole, 1e-14)

# %% [markdown]
# ## Step 4: backward, the weights once more
# Chapter 5 has the rules without dropout. **Dropout** sets each weight to 0 with the
# probability $r$, and divides the others by $1 - r$. So the weights after dropout are
# $W = P \odot \frac{\text{keep}}{1-r}$, where $\odot$ multiplies entry by entry, and
# keep is 1 for a weight that stays and 0 for another. Dropout is linear in $P$, so
# backward it multiplies by the same factor:
#
# $$d_v = W^\top d_o, \qquad d_P = (d_o v^\top) \odot \frac{\text{keep}}{1 - r}, \qquad
# d_S = P \odot (d_P - \operatorname{rowsum}(d_P \odot P)).$$
#
# All of them need $P$, which we refused to keep. But a single number per row is enough
# to compute it again. The **logsumexp** of the row is $L = \log\sum_s e^{S_s} = m +
# \log l$, known at the end of the forward pass. Then
#
# $$P_s = e^{S_s - L},$$
#
# for any tile, at any time, without its neighbours. So the forward pass keeps $q$, $k$,
# $v$, $o$ and $L$. The backward pass computes the scores a second time. That is one
# more matrix product in exchange for the memory. On machines that multiply much faster
# than they read memory, it can even save time.
#
# ## Step 5: the row sum
# One thing still looks at the whole row: $\operatorname{rowsum}(d_P \odot P)$. It is
# needed before the first tile can be finished, and it seems to need the last one. Put
# the definitions in. Dropout multiplies by the same factor in $d_P = d_W \odot
# \frac{\text{keep}}{1-r}$ and in $W = P \odot \frac{\text{keep}}{1-r}$, so it does not
# matter to which of the two we give it:
#
# $$\sum_s (d_P)_{ts} P_{ts} = \sum_s (d_W)_{ts} W_{ts}
# = \sum_s \langle (d_o)_t, v_s\rangle\, W_{ts}
# = \Bigl\langle (d_o)_t, \sum_s W_{ts} v_s\Bigr\rangle$$
#
# and the last sum is the output:
#
# $$\boxed{\;\operatorname{rowsum}(d_P \odot P)_t = \langle (d_o)_t, o_t\rangle\;}$$
#
# It costs T A products, and it is known before the loop begins. Under dropout it holds
# with the *dropped* output $o$. A planted bug takes undropped weights here.
#
# In the loop, a tile's $d_k$ and $d_v$ are complete when the tile is done, because no
# other tile has its keys. $d_q$ collects from all tiles:
#
# $$d_q \mathrel{+}= \frac{d_S\, k_{\text{tile}}}{\sqrt A}, \qquad
# d_k = \frac{d_S^\top q}{\sqrt A}, \qquad d_v = W^\top d_o.$$

# %%
shown(flash.flash_attention_forward, flash.flash_attention_backward)

# %%
T, A, RATE = 12, 4, 0.25
q, k, v, d_o = (jax.random.normal(jax.random.key(i), (2, T, A)) for i in range(4))
keep = jax.random.bernoulli(jax.random.key(4), 1 - RATE, (2, T, T))
o, cache = attention_forward(q, k, v, causal_mask(T), keep, RATE)
at_once = attention_backward(d_o, cache)
print("Attention at once and by tiles, causal, with dropout: o and its gradients")
for tile in (1, 3, 5, 12):
    tiled, tiles = flash.flash_attention_forward(q, k, v, keep, RATE, True, tile)
    gradients = flash.flash_attention_backward(d_o, tiles)
    agree(f"  tiles of {tile:2}", (tiled, gradients), (o, at_once), 1e-13)

*_, (p,), _ = cache
d_p = jnp.where(keep, d_o @ jnp.swapaxes(v, -1, -2) / (1 - RATE), 0.0)
agree("step 5, both sides", jnp.sum(d_p * p, -1), jnp.sum(d_o * o, -1), 1e-13)

# %% [markdown]
# ## What it looks like, and what it saves
# First, the answer of one query after each tile, three coordinates. It may jump when a
# tile brings a new largest score, because then everything before shrinks by $e^{m_1 -
# m}$. It is exact at the last tile and means nothing before.
#
# Then numbers that are kept for the backward pass, for one head of width 64. The matrix
# grows with $T^2$, and the rest grows with T. Without tiles the inputs and the output
# are kept as well, so that line is the sum.

# %%
long = 4.0 * jax.random.normal(jax.random.key(9), (1, 48))
values = jax.random.normal(jax.random.key(10), (48, 3))
path = jnp.array([answer for _, _, answer in by_tiles(long, values, 3)])
lines = {f"coordinate {i}": path[:, i] for i in range(3)}
lengths = [2**n for n in range(6, 15)]
kept = {
    "at once: P, q, k, v and o": (lengths, [t * t + 4 * 64 * t for t in lengths]),
    "tiles: q, k, v, o and L": (lengths, [(4 * 64 + 1) * t for t in lengths]),
}
pictures.curves({"after each tile of 3 keys": lines}, "tile", "answer", markers=True)
pictures.curves({"kept for the backward pass": kept}, "T", "numbers", log=True, log_x=2)
at_once, in_tiles = (numbers[6] for _, numbers in kept.values())
print(f"at T = {lengths[6]}: {at_once / in_tiles:.0f} times as many")

# %% [markdown]
# ## Exercises
# In the terminal: `uv run python -m foundation derive flash_attention` asks for steps 4
# and 5.

# %%
check("11.1", None)

# %%
check("11.2", None)

# %%
check("11.3", None)

# %% [markdown]
# # 12. What may be cached?
#
# A language model writes one token, appends it, and looks at the longer text again.
# Done simply, the hundredth token costs a pass over a hundred tokens, of which 99 were
# computed before. So everybody keeps, or **caches**, what was computed. But a number
# may be kept only if it will not change. **When is an output a function of the text
# before it, and of nothing else?** For attention the answer is easy. A mixture of
# experts can be perfectly causal in training and still give other answers from a cache.
#
# The code is `foundation/caching.py` and, for step 4, `foundation/latent_attention.py`.
# The project writes with `moe_jax/inference/decode.py`. Its queues are in
# `moe_jax/model/moe/router.py`, and `moe_jax/certify/causality.py` tests a trained
# model.
#
# ## Step 1: two tests, not one
# A layer takes a text of T tokens and gives T outputs. Output $t$ is a **function of
# the prefix** if it depends on tokens $0, \dots, t$ only. There are two ways to break
# this, and they need two tests:
#
# - **Content.** Change a token *after* $t$. Does output $t$ move?
# - **Length.** *Cut off* the tokens after $t$. Does output $t$ move?
#
# Training needs the first. If a later token could reach an earlier output, the answer
# would be in the question. But in training all texts have one length, so the second is
# never tried. Writing needs both, because the text grows.
#
# ## Step 2: attention
# Under the causal mask, output $t$ is
#
# $$o_t = \sum_{s \le t} P_{ts} v_s, \qquad
# P_{ts} = \frac{e^{\langle q_t, k_s\rangle / \sqrt A}}
# {\sum_{r \le t} e^{\langle q_t, k_r\rangle/\sqrt A}}.$$
#
# No $s > t$ occurs, and no T. Both tests pass. So layer after layer, the stream at $t$
# is a function of the prefix. The key $k_s$ and the value $v_s$ are computed from the
# stream at $s$. They never change, and every later query reads them: keep them. The
# query $q_t$ is read once, at its own step: do not keep it. The **key-value cache** is
# just that, two arrays for each layer.
#
# ## Step 3: positions
# With rotary positions (chapter 6) the key at position $s$ is turned by an angle
# proportional to $s$, which does not change when the text grows, so the *turned* key
# can be kept. But the program has to know the position of the new token, a favourite
# place for a mistake. Suppose it is one too high. Scores depend on the *difference*:
#
# $$\langle R_t q, R_s k\rangle = \langle q, R_{s - t} k\rangle.$$
#
# So if *all* positions are one too high, nothing changes at all. If only those of the
# new tokens are, they see the prompt from one step too far away. The text is a little
# worse, and no error is raised. The cell below measures both.

# %%
from foundation import attention, caching, latent_attention
from foundation.lessons.notebook import check, jax, jnp, pictures, shown

shown(caching.projected, caching.prefill, caching.decode_step)

# %%
T, D, H, PROMPT = 10, 16, 2, 4
x = jax.random.normal(jax.random.key(0), (1, T, D))
params = {
    "qkv": {"kernel": jax.random.normal(jax.random.key(1), (D, 3 * D)) / 4},
    "out": {"kernel": jax.random.normal(jax.random.key(2), (D, D)) / 4},
}
whole, _ = attention.multi_head_forward(x, params, H, rotary=True)


def off_by(y):
    return float(jnp.max(jnp.abs(y - whole)))


def attended(q, k, v):
    o, _ = attention.attention_forward(q, k, v, attention.causal_mask(T))
    return attention.join_heads(o) @ params["out"]["kernel"]


right, too_high = (caching.projected(x, params, H, first) for first in (0, 1))
is_new = jnp.arange(T)[:, None] >= PROMPT
new_ones = [jnp.where(is_new, b, a) for a, b in zip(right, too_high, strict=True)]
cached = caching.decode(x, params, H, PROMPT)
for name, y, least, most in (
    ("token by token, with a cache", cached, 0.0, 1e-13),
    ("all positions one too high", attended(*too_high), 0.0, 1e-13),
    ("only those of the new tokens", attended(*new_ones), 1e-3, 10.0),
):
    print(f"{name}: {off_by(y):.1e} from attention at once")
    assert least <= off_by(y) < most

# %% [markdown]
# ## Step 4: how many bytes?
# For each position and each layer the cache holds a key and a value of A numbers for
# each of H heads: $2HA$ numbers. Every new token reads all of it, so it bounds both the
# longest text and the speed. There are three ways to make it smaller.
#
# **Fewer key heads (GQA).** Groups of query heads share one of KV key heads (chapter
# 5): $2\,\text{KV}\,A$ numbers.
#
# **A latent (MLA).** Keep one narrow vector $c = xW_c$, with C numbers, and make the
# keys and values of all heads from it when they are needed: $k_h = c W_{k,h}$, $v_h = c
# W_{v,h}$. A rotation may not stand between (it changes with the position), so R more
# numbers, $r = \operatorname{rope}(x W_r)$, carry the position, as one key that all
# heads share. That makes $C + R$ numbers. Backward there is nothing new: $c$ is used
# for keys and for values, and $r$ by every head, so their gradients are sums,
#
# $$\boxed{\;d_c = \sum_h d_{k_h} W_{k,h}^\top + d_{v_h} W_{v,h}^\top, \qquad
# d_r = \operatorname{rope}^{-1}\Bigl(\sum_h d_{k_h}\big|_{\text{last } R}\Bigr)\;}$$
#
# When writing, not even the keys are made: $\langle q, c\,W_k\rangle = \langle
# q\,W_k^\top, c\rangle$ moves the matrix to the one new query. `absorbed` does this,
# and the table holds it against the plain way.
#
# **A window.** Position $t$ sees the last $w$ positions alone, so the cache stops
# growing. L layers still see $L(w - 1)$ positions back, one window each. Trained models
# put much weight on the first tokens, because a softmax must put it somewhere. Xiao et
# al. (2023) found that texts break down when these leave the window. So the first few
# are kept, as **sinks**.

# %%
shown(latent_attention.latent_attention_backward, caching.window_mask)

# %%
reach = caching.window_mask(16, 4).astype(float)
panels = {
    "window of 4, one sink": caching.window_mask(16, 4, 1),
    "window of 4: 2 layers": reach @ reach > 0,
    "3 layers": reach @ reach @ reach > 0,
}
axes = ("position that is seen", "position")
pictures.heatmaps(panels, *axes, numbers="", diverging=False)
farthest = [int(jnp.max(15 - jnp.argmax(m[15] > 0))) for m in (reach, reach @ reach)]
print("positions back, 1 and 2 layers:", farthest)
assert farthest == [3, 6]

# %% [markdown]
# In bytes, with 16 bits a number, for shapes from the public `config.json` of each
# model. Beside it: the same, if every head had its own keys and values in the cache.

# %%
print(f"{'model':<28}{'bytes a token':>14}{'all heads':>11}{'32,768 tokens':>15}")
for model, layers, plain, numbers, most in (
    ("OLMoE: 16 heads", 16, 2 * 16 * 128, 2 * 16 * 128, None),
    ("Mixtral 8x7B: 8 of 32 (GQA)", 32, 2 * 32 * 128, 2 * 8 * 128, None),
    ("Mistral 7B: window of 4,096", 32, 2 * 32 * 128, 2 * 8 * 128, 4_096),
    ("DeepSeek-V3: MLA, 512 + 64", 61, 128 * (192 + 128), 512 + 64, None),
):
    token, whole = 2 * layers * numbers, 2 * layers * plain
    text = token * min(32_768, most or 32_768)
    print(f"{model:<28}{token:>14,}{whole:>11,}{text / 2**20:>11,.0f} MiB")
_, cache = caching.prefill(x, params, H, T)
assert sum(a.nbytes for a in cache) == 2 * D * 8 * T  # float64

# %% [markdown]
# ## Step 5: slots of experts
# In a mixture of experts, tokens meet in a second place. Each expert has $C$ slots, and
# the tokens that want it stand in a **queue**. The first $C$ get a slot, the others are
# dropped (chapter 8). Whether token $t$ is served is then a question about its queue:
#
# $$\text{token } t \text{ keeps its slot} \iff
# \#\{s : s \text{ wants it and is before } t\} < C.$$
#
# This one line decides everything. The left side is a function of the prefix if both
# parts of the right side are.
#
# **The set of tokens before $t$** must contain no later token, for any text. A queue in
# the order of positions contains none. If it looks at anything else *first*, a later
# token can be before an earlier one: it only has to be better by that measure.
#
# **The capacity $C$** must not depend on the tokens after $t$. The usual one does: $C =
# \lceil c\,TK/E\rceil$ contains the length T. Cut the text, and $C$ shrinks. A token
# that had the last slot has none.
#
# Six rules are in use, or could be:
#
# - **none**: no limit. Nothing is dropped.
# - **token**: by position, $C$ from T. Training with `--dispatch capacity` uses it.
# - **token, growing**: by position. Token $t$ compares with the capacity of the tokens
#   so far.
# - **choice**: all first choices before all second choices, then by position.
# - **batch**: as "choice", but surer tokens first. It keeps what matters most, and is
#   popular for images, which have no future.
# - **expert**: each expert takes the $C$ tokens that like it most. Perfect balance.
#
# So "token" must pass the test of content and fail the test of length; "choice",
# "batch" and "expert" must fail both. Only "none" and "token, growing" may be cached.
#
# ## Step 6: all texts
# A test with one text can show a leak. It cannot show that there is none. So take *all*
# texts: four tokens, each of one of six kinds, makes 1,296. For each pair of texts that
# differ in one token, and for each cut, compare which experts each token keeps.
#
# The squares show three experts, K = 2 and a capacity factor of 3/4. Above: a changed
# token (down) and the outputs that can move (across). Blue cells are on the diagonal
# and to the right, where a change *may* act. A red cell is an earlier output that moves
# because of a later token. Below: a cut, and the remaining outputs that move. Here
# every red cell is a leak, and grey cells were cut away. ("choice" is in the list
# only.)

# %%
kinds = [[5, 3, 2], [2, 7, 1], [1, 2, 6], [6, 1, 2], [3, 5, 2], [2, 3, 5]]
kinds = jnp.array(kinds) / 10
drawn = ("none", "token", "token, growing", "batch", "expert")
squares = {rule: caching.reach(kinds, 4, 2, 0.75, rule) for rule in drawn}
rows = (("content", "changed token"), ("length", "tokens that are kept"))
pictures.triangles(squares, rows)
print("rule             content   length")
for rule in caching.RULES:
    found = caching.leaks(kinds, 4, 2, 0.75, rule)
    content, length = ("leaks" if leak else "passes" for leak in found)
    print(f"{rule:<16} {content:<9} {length}")
assert not caching.leaks(kinds, 4, 2, 0.75, "token, growing").any()

# %% [markdown]
# ## What follows for a program
# Training with the rule "token" is honest: no answer is in the question. But a model
# trained so must not be *written with* so. Between one step and the next, the capacity
# grows, and a token that was dropped before may be served now. Its key and value in the
# cache are then those of another computation. There are two ways out. Either drop
# nothing when writing, the rule "none": this project does that, in evaluation too. Or
# train with a capacity that grows with the position, and keep the counts in the cache.
#
# The first is simpler, and has a price. The model that writes is not quite the model
# that was trained, since that one dropped some choices. So the loss is measured without
# drops as well, and training reports how much it drops.
#
# ## Exercises

# %%
check("12.1", None)

# %%
check("12.2", None)

# %%
check("12.3", None)

# %% [markdown]
# # 7. A transformer that writes
#
# Every part is derived. Now we put them together to the smallest complete language
# model: it reads a text, guesses the next character, learns from its mistakes by the
# gradients of the earlier chapters, and then writes. It has no experts yet. The next
# chapter replaces one of its parts by a mixture, and you will see that nothing else
# changes.
#
# The code is `foundation/dense_transformer.py` and `foundation/feed_forward.py`.
#
# ## What goes in and what comes out
# A text is a sequence of **tokens**, numbers from 0 to V - 1. Here a token is one
# character. From tokens 1 to $t$ the model computes V numbers, the **logits** of token
# $t + 1$. Their softmax is its guess, and the loss is the cross-entropy of the
# character that really comes (chapter 4). Because the mask of attention hides the
# future (chapter 5), one pass gives a guess at every position, and each counts in the
# loss.

# %%
from foundation import dense_transformer as dense
from foundation import train_by_hand
from foundation.feed_forward import feed_forward_backward, feed_forward_forward
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown
from foundation.optimizers import adam_init, adam_update
from foundation.parity import Check, max_relative_error, run
from foundation.writing import write

# %%
tokens, alphabet = train_by_hand.corpus()
HEADS, WIDTH, LAYERS, HIDDEN, T, STEPS = 4, 64, 2, 192, 64, 600
print(f"{len(tokens)} characters, {len(alphabet)} of them different")
print(repr("".join(alphabet[i] for i in tokens[:70])))

# %% [markdown]
# ## The residual stream
# Every position carries a vector of D numbers from the bottom of the model to the top,
# the **residual stream**. A block does not replace it. It *adds* to it, twice:
#
# $$a = x + \text{attention}(\text{norm}(x)), \qquad
# y = a + \text{network}(\text{norm}(a)).$$
#
# Attention moves information between positions. The network works on each position by
# itself. Now read the second equation backward. Step by step:
#
# 1. $y$ is a sum, so its cotangent $d_y$ goes to *both* terms, unchanged.
# 2. The second term is a chain: network, then norm. Their backward passes turn $d_y$
#    into what this way sends back to $a$. Call it $d_a^{\text{branch}}$.
# 3. $a$ was used twice, so its gradient is the sum: $d_a = d_y + d_a^{\text{branch}}$.
# 4. The first equation has the same form: $d_x = d_a + d_x^{\text{branch}}$.
#
# The straight way has no factor in it. Through twenty blocks or two hundred, the
# gradient of the loss reaches the lowest block undiminished. This is why deep models
# can be trained at all; chapter 3 showed what happens without.

# %%
shown(dense.dense_block_forward, dense.dense_block_backward)

# %% [markdown]
# ## The network: SwiGLU
# The network of a block is the only part that is new:
#
# $$a = x W_{gate}, \quad u = x W_{in}, \quad h = \text{silu}(a) \odot u, \quad
# y = h W_{out}$$
#
# ($\odot$ is the product entry by entry.) It is two affine maps, one of which opens and
# closes the other like a gate, and a third that brings the width back to D. Backward,
# from the last line to the first:
#
# 1. $y = h W_{out}$ is chapter 2: $d_h = d_y W_{out}^\top$ and $d_{W_{out}} = h^\top
#    d_y$.
# 2. $h$ is a product, so each factor gets the cotangent times the *other* factor:
#    $d_{\text{silu}(a)} = d_h \odot u$ and $d_u = d_h \odot \text{silu}(a)$.
# 3. silu is elementwise, chapter 3: $d_a = \text{silu}'(a) \odot d_h \odot u$.
# 4. Two more affine maps: $d_{W_{gate}} = x^\top d_a$ and $d_{W_{in}} = x^\top d_u$.
# 5. $x$ went into both, so $d_x = d_a W_{gate}^\top + d_u W_{in}^\top$.
#
# In the code $\text{silu}(a)$ is `opened`.

# %%
shown(feed_forward_forward, feed_forward_backward)

# %%
x, w_gate, w_in, w_out = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(5, 4), (4, 6), (4, 6), (6, 4)])
)
swiglu = Check(
    "feed_forward",
    "here",
    feed_forward_forward,
    feed_forward_backward,
    (x, w_gate, w_in, w_out),
)
outcome = run(swiglu)
print(f"SwiGLU: {outcome.autodiff:.1e} from autodiff,", end=" ")
print(f"{outcome.finite_difference:.1e} from finite differences")
assert outcome.passed

# %% [markdown]
# ## The two ends
# At the bottom each token reads its row of a table, the **embedding**. At the top the
# same table, transposed, turns the stream into logits: the logit of token $v$ is the
# inner product of the stream with row $v$. A table that is used at both ends is called
# *tied*. By now you know what follows: its gradient is the sum of both uses. The
# look-up adds each position's gradient to the row that it read. The head adds
# $d_{logits}^\top x$.
#
# That is everything. The model's backward pass is its forward pass from the end to the
# start. Here it is against autodiff, in every parameter:

# %%
params = dense.init_dense_params(
    jax.random.key(0), len(alphabet), WIDTH, LAYERS, HIDDEN
)
window = train_by_hand.batch(tokens, 0, T)
inputs, targets = window[:, :-1], window[:, 1:]
loss, cache = dense.dense_loss_forward(params, inputs, targets, HEADS)
by_hand = dense.dense_loss_backward(jnp.ones(()), cache)
by_jax = jax.grad(lambda p: dense.dense_loss_forward(p, inputs, targets, HEADS)[0])(
    params
)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
error = max_relative_error(by_hand, by_jax)
print(f"loss {loss:.3f}; largest relative difference from jax.grad {error:.1e}")
assert error < 1e-10

# %% [markdown]
# ## Training
# A **step** takes four windows of the text, computes the loss and its gradient, and
# moves every parameter a little against its gradient. How far is decided by the
# optimizer, here Adam: it divides each gradient by a running mean of its size, so that
# all parameters move at about the same speed (`foundation/optimizers.py`).
#
# What loss should we expect? A uniform guess among V characters costs $\ln V$ nats. Who
# counts the characters of the text and always guesses in these proportions pays its
# *entropy*, the best that can be done without looking at the context. And who looks at
# one character of context pays the *bigram* loss: a table of which character follows
# which. A model that goes below that has learned to use more than one character, which
# only attention can bring.
#
# The first loss is above $\ln V$, though the model has learned nothing. It does not
# guess uniformly: its table is tied. The stream of a token still has much of its own
# row in it, and the inner product of a row with itself is large. So the new model
# expects each character to come again. That is a gift of the tie, not a fault: "near
# the row of what was read" is where likely successors can be put, and the wrong guess
# is gone after a few steps.


# %%
def entropy(counts):
    p = counts / counts.sum(-1, keepdims=True)
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1)


text = np.asarray(tokens)
pairs = np.zeros((len(alphabet), len(alphabet)))
np.add.at(pairs, (text[:-1], text[1:]), 1.0)
bigram = np.sum(pairs.sum(-1) / pairs.sum() * entropy(pairs + 1e-12))
print(f"uniform guess {np.log(len(alphabet)):.2f} nats a character")
print(f"counts of characters {entropy(np.bincount(text)):.2f}, of pairs {bigram:.2f}")


# %%
@jax.jit
def step(params, state, window, lr):
    loss, cache = dense.dense_loss_forward(params, window[:, :-1], window[:, 1:], HEADS)
    gradient = dense.dense_loss_backward(jnp.ones_like(loss), cache)
    params, state = adam_update(gradient, state, params, lr, beta2=0.95)
    return params, state, loss


as_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
trained, state, losses = as_float32, adam_init(as_float32), []
for n in range(STEPS):
    lr = 4e-3 * (1.0 - n / STEPS)  # long steps first, short ones at the end
    window = train_by_hand.batch(tokens, n, T)
    trained, state, loss = step(trained, state, window, jnp.float32(lr))
    losses.append(float(loss))
own = jnp.take_along_axis(
    dense.dense_model_forward(as_float32, inputs, HEADS)[0], inputs[..., None], -1
)
print(f"before: logit of the character that was just read {float(jnp.mean(own)):.2f}")
print(f"loss {losses[0]:.2f} -> {np.mean(losses[-20:]):.2f}")
assert np.mean(losses[-20:]) < bigram

# %%
pictures.curves(
    {"trained by hand": {"loss": losses, "pairs of characters": [bigram] * STEPS}},
    xlabel="step",
    ylabel="nats per character",
)

# %% [markdown]
# ## Writing
# To write, we ask for the logits of the next character, choose one, append it, and ask
# again. Always taking the likeliest gives one fixed text. Drawing from the softmax
# gives a new one each time; dividing the logits by a **temperature** below 1 first
# makes the draw more careful.
#
# The text has under a thousand characters, and the model has more than a hundred times
# as many parameters. So it learns the text *by heart*, and you will recognise whole
# sentences. That is no proof of understanding, but it is proof of a gradient: nothing
# in this notebook but the two checks above asked jax for a derivative.


# %%
@jax.jit
def next_logits(tokens, count):
    logits, _ = dense.dense_model_forward(trained, tokens, HEADS)
    return logits[0, count - 1]


random = np.random.default_rng(0)


def draw(logits, _, temperature=0.7):
    p = np.exp((logits - logits.max()) / temperature)
    return int(random.choice(len(p), p=p / p.sum()))


start = [alphabet.index(c) for c in "When a stranger"]
likeliest = "".join(alphabet[i] for i in write(next_logits, start, T, 240))
print("likeliest:\nWhen a stranger" + likeliest)
start = [alphabet.index(c) for c in "The stranger sang"]  # not in the text
drawn = "".join(alphabet[i] for i in write(next_logits, start, T, 240, draw))
print("\ndrawn:\nThe stranger sang" + drawn)

# %% [markdown]
# ## What each position looks at
# The weights of attention are in the cache of the forward pass. Below are the four
# heads of the first layer, for the first characters of the text. A row is a position
# that looks, a column one that is looked at. Above the diagonal everything is exactly
# 0: the future. Each head has a pattern of its own. Some rows look at the character
# before, as a table of pairs would. Others reach further back, to the beginning of the
# word or of the text.

# %%
_, cache = dense.dense_model_forward(trained, tokens[None, :16], HEADS)
attention_cache = cache[1][0][1]  # blocks, the first, its attention
weights = np.asarray(attention_cache.attention.kept[0])
letters = [alphabet[i] for i in tokens[:16]]
pictures.heatmaps(
    {f"head {h}": weights[h] for h in range(HEADS)},
    xlabel="looked at",
    ylabel="looking",
    columns=letters,
    rows=letters,
    numbers="",
    diverging=False,
    height=3.2,
)
assert (np.triu(weights, 1) == 0.0).all()

# %% [markdown]
# ## Exercises
# In the terminal: `uv run python -m foundation derive feed_forward`, and then
# `uv run python -m foundation hunt 7`, which plants a bug of chapters 2 to 7 for you to
# find. `--seed` with a number gives a whole class the same bug.

# %%
check("7.1", None)

# %%
check("7.2", None)

# %%
check("7.3", None)

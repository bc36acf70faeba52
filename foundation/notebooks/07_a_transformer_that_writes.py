# %% [markdown]
# # 7. A transformer that writes
#
# Every part is derived. Now we put them together to the smallest complete language
# model: it reads a text, guesses the next token, learns from its mistakes by the
# gradients of the earlier chapters, and then writes a story. It has no experts yet:
# chapter 8 replaces one of its parts by a mixture, and nothing else changes.
#
# The code is `foundation/dense_transformer.py` and `foundation/feed_forward.py`.
#
# ## What goes in and what comes out
# A text is a sequence of **tokens**, numbers from 0 to V - 1. Here they are the byte
# pairs of chapter 20: short words, and pieces of long ones. From tokens 1 to $t$ the
# model computes V numbers, the **logits** of token $t + 1$. Their softmax is its guess,
# and the loss is the cross-entropy of the token that really comes (chapter 4). Because
# the mask of attention hides the future (chapter 5), one pass gives a guess at every
# position, and each counts in the loss.
#
# The texts are short stories, one a line, in `foundation/stories.txt`. The model learns
# from the first 400. The last 40 are for **validation**: no step sees them, so their
# loss says what the model has understood, and not what it knows by heart.

# %%
import jax.numpy as jnp

from foundation import byte_pairs, feed_forward, optimizers, train_by_hand, writing
from foundation import dense_transformer as dense
from foundation.lessons.notebook import agree, check, checked, jax, np, pictures, shown

# %%
HEADS, WIDTH, LAYERS, HIDDEN = 4, 96, 3, 256
T, WINDOWS, STEPS, PAIRS = 128, 4, 800, 500
stories, unseen = train_by_hand.stories()


def words_of(text):
    """Its words as bytes, each with the space before it. A line's end is a word too."""
    spaced = text.replace("\n", " \n ").split(" ")
    return [b"\n" if word == "\n" else f" {word}".encode() for word in spaced if word]


words = words_of(stories)
counts = {tuple(word): words.count(word) for word in set(words)}
pairs = byte_pairs.learn(counts, PAIRS)
VOCABULARY = byte_pairs.BYTES + PAIRS


def ids_of(text):
    codes = {word: byte_pairs.encode(word, pairs) for word in set(words_of(text))}
    return jnp.array([number for word in words_of(text) for number in codes[word]])


def text_of(ids):
    return byte_pairs.spelled(tuple(map(int, ids)), pairs).decode()


tokens, validation = ids_of(stories), ids_of(unseen)
print(f"{len(tokens):,} tokens to learn from, {len(validation):,} for validation;")
print(f"a token has {len(unseen) / len(validation):.2f} characters. The first ones:")
print("|".join(text_of([token]) for token in tokens[:60]))

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
# The straight way has no factor in it: through two hundred blocks the gradient reaches
# the lowest one undiminished. This is why deep models can be trained at all; chapter 3
# showed what happens without.

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
shown(feed_forward.feed_forward_forward, feed_forward.feed_forward_backward)

# %%
shapes = enumerate([(5, 4), (4, 6), (4, 6), (6, 4)])  # x, w_gate, w_in, w_out
arrays = tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in shapes)
pair = (feed_forward.feed_forward_forward, feed_forward.feed_forward_backward)
checked("SwiGLU", *pair, arrays)

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
params = dense.init_dense_params(jax.random.key(0), VOCABULARY, WIDTH, LAYERS, HIDDEN)
window = train_by_hand.batch(tokens, 0, 16)
inputs, targets = window[:, :-1], window[:, 1:]
loss, cache = dense.dense_loss_forward(params, inputs, targets, HEADS)
by_hand = dense.dense_loss_backward(jnp.ones(()), cache)
gradient_of = jax.grad(lambda *given: dense.dense_loss_forward(*given)[0])
by_jax = gradient_of(params, inputs, targets, HEADS)
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, loss {loss:.3f}")
agree("by hand and by jax.grad", by_hand, by_jax, 1e-10)

# %% [markdown]
# ## Training
# A **step** takes four windows of the text, computes the loss and its gradient, and
# moves every parameter a little against it. How far is decided by the optimizer, here
# Adam (chapter 10), which makes all parameters move at about the same speed.
#
# What loss should we expect? A uniform guess among V tokens costs $\ln V$ nats. Who
# knows only how frequent each token is pays less. Who looks at one token of context
# pays the *bigram* loss: a table of which token follows which. A model that goes below
# that has learned to use more than one token, which only attention can bring. And there
# is an end: a grammar with dice wrote these stories, and the dice cost 0.176 nats a
# character in the 40 stories of validation. No model can do better.
#
# The first loss is above $\ln V$, though the model has learned nothing. The cause is
# the tied table. The stream of a token still has much of its own row in it, and the
# inner product of a row with itself is large, so the new model expects each token to
# come again. That is a gift, not a fault: "near the row of what was read" is where
# likely successors can be put, and the wrong guess is gone after a few steps.


# %%
def nats(counts, first, second):
    """Mean of -log p of each token, by a table of what follows which."""
    p = (counts + 0.01) / (counts + 0.01).sum(-1, keepdims=True)
    return -np.mean(np.log(p[first, second]))


text, held = np.asarray(tokens), np.asarray(validation)
table = np.zeros((VOCABULARY, VOCABULARY))
np.add.at(table, (text[:-1], text[1:]), 1.0)
single, bigram = nats(table.sum(0)[None], 0, held), nats(table, held[:-1], held[1:])
GRAMMAR = 0.176 * len(unseen) / len(held)
print(f"nats a token: uniform {np.log(VOCABULARY):.2f}, by frequency {single:.2f}")
print(f"pairs of tokens {bigram:.2f}, the grammar's dice {GRAMMAR:.2f}")


# %%
@jax.jit
def step(params, state, window, lr):
    loss, cache = dense.dense_loss_forward(params, window[:, :-1], window[:, 1:], HEADS)
    gradient = dense.dense_loss_backward(jnp.ones_like(loss), cache)
    params, state = optimizers.adam_update(gradient, state, params, lr, beta2=0.95)
    return params, state, loss


@jax.jit
def loss_of(params, windows):
    return dense.dense_loss_forward(params, windows[:, :-1], windows[:, 1:], HEADS)[0]


as_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
trained, state = as_float32, optimizers.adam_init(as_float32)
losses, validated = [], {}
starts = np.arange(0, len(held) - T, T)
held_windows = validation[starts[:, None] + np.arange(T + 1)]
for n in range(STEPS):
    lr = 4e-3 * min(1.0, (n + 1) / 20) * (1.0 - n / STEPS)  # up in 20 steps, then down
    window = train_by_hand.batch(tokens, n, T, WINDOWS)
    trained, state, loss = step(trained, state, window, jnp.float32(lr))
    losses.append(float(loss))
    if (n + 1) % 50 == 0:
        validated[n + 1] = float(loss_of(trained, held_windows))
first_logits, _ = dense.dense_model_forward(as_float32, inputs, HEADS)
own = jnp.take_along_axis(first_logits, inputs[..., None], -1)
print(f"before: logit of the token that was just read {float(jnp.mean(own)):.2f}")
print(f"training loss {losses[0]:.2f} -> {np.mean(losses[-20:]):.2f}")
by_character = validated[STEPS] * len(held) / len(unseen)
print(f"validation loss {validated[STEPS]:.2f}, {by_character:.3f} nats a character")
assert GRAMMAR < validated[STEPS] < bigram / 2
lines = {
    "training": losses,
    "validation": (list(validated), list(validated.values())),
    "pairs of tokens": [bigram] * STEPS,
    "the grammar's dice": [GRAMMAR] * STEPS,
}
pictures.curves({"trained by hand": lines}, "step", "nats per token")

# %% [markdown]
# That takes less than two minutes on two cores.
#
# ## Writing
# Ask for the logits of the next token, choose one, append it, and ask again. Always
# taking the likeliest gives one fixed text. Drawing from the softmax gives a new one
# each time; dividing the logits by a **temperature** below 1 first makes the draw more
# careful. A story ends with its line.
#
# Only the two checks above have asked jax for a derivative. Read what the gradients of
# seven chapters have made of random numbers:


# %%
@jax.jit
def next_logits(tokens, count):
    logits, _ = dense.dense_model_forward(trained, tokens, HEADS)
    return logits[0, count - 1]


random = np.random.default_rng(0)


def draw(logits, _, temperature=0.5):
    p = np.exp((logits - logits.max()) / temperature)
    return int(random.choice(len(p), p=p / p.sum()))


def story(start, choose=None):
    """A start, written on to the end of the line."""
    start_ids = ids_of(start).tolist()
    new = writing.write(next_logits, start_ids, T, 200, choose, ord("\n"))
    return start + text_of(new)


written = [story("Once upon a"), story("Long ago, one windy", draw)]
written.append(story("One rainy day, a lively girl named Mia", draw))
print("\n\n".join(written))

# %% [markdown]
# The sentences are right, and they follow on each other as in a story. What the model
# lacks is memory: the hero's name changes on the way. To keep it, one head must find
# the name, and a head of a later block must take it over. More steps would teach that.
#
# Are these sentences copies? Count those that occur in the text which the model learned
# from:

# %%
sentences = [s.strip() for w in written for s in w.split(". ") if len(s) > 20]
copied = sum(s in stories for s in sentences)
print(f"{len(sentences)} sentences of more than 20 letters, {copied} of them copied")
assert copied < len(sentences) / 2

# %% [markdown]
# ## What the residual stream carries
# The stream has the same D entries everywhere, so the last norm and the head may read
# it *earlier*: take the upper blocks away, and ask what they would guess now. Below is
# the probability of the token that really comes, in a story that the model has not
# seen. A row is a position, with the token that it has read and the one that comes. A
# column is a height of the stream.
#
# The left column has no block at all: it expects the same token again, and is wrong.
# Each block adds to the guess. Where a phrase is fixed, the lower blocks know how it
# goes on. Where a new name or colour comes, even the last one can only share out its
# probability: there the dice are thrown.

# %%
shown_ids = validation[:25]


def guess(blocks):
    """Probability of each next token, by the model's lowest blocks alone."""
    lowest = {**trained, "blocks": trained["blocks"][:blocks]}
    logits, _ = dense.dense_model_forward(lowest, shown_ids[None, :-1], HEADS)
    return jax.nn.softmax(logits)[0, np.arange(24), shown_ids[1:]]


pieces = [text_of([token]) for token in shown_ids[:-1]]
guesses = np.array([guess(n) for n in range(LAYERS + 1)])
rows = [f"{a} ->{text_of([b])}" for a, b in zip(pieces, shown_ids[1:], strict=True)]
panel = {"probability of what comes": guesses.T}
pictures.heatmaps(panel, "blocks", rows=rows, diverging=False, height=6.4)
print("mean:", ", ".join(f"{p:.2f}" for p in guesses.mean(1)))
assert guesses[-1].mean() > guesses[0].mean() + 0.3

# %% [markdown]
# ## Queries, keys and values
# Inside a block, attention splits the normed stream into three parts for each head:
# what a position looks for (its **query** $q$), what it can be found by (its **key**
# $k$), and what it hands over (its **value** $v$). All three are in the cache of the
# forward pass. Follow *one* position through one head of the first block: the token
# "named". A row of the picture is a position that it can look at.
#
# First the products $q_a k_{sa} / \sqrt A$, entry by entry, in the order of what they
# add to the largest score. A row adds up to the score of that position, and the softmax
# of the scores is the weight: both stand beside the row. Where a row is red, query and
# key have the same sign. (RoPE has turned both, so that "one token ago" is a direction
# too.) Then what each position hands over: its value, times its weight. A column adds
# up to an entry of the output $o$. Rows of little weight are pale, whatever their
# value: *scores decide who is heard, values what is said*.

# %%
_, cache = dense.dense_model_forward(trained, shown_ids[None, :16], HEADS)
_, (first, *_), *_ = cache  # of the blocks the first
_, (*_, (q, k, v, kept, *_), _), *_ = first  # its attention, and in it the heads
HEAD, A, t = 1, WIDTH // HEADS, 13
pieces = pieces[: t + 1]
products = q[0, HEAD, t] * k[0, HEAD, : t + 1] / A**0.5
scores, weights = products.sum(1), kept[0, HEAD, t, : t + 1]
order = jnp.argsort(-products[jnp.argmax(scores)])
numbers = zip(pieces, scores, weights, strict=True)
rows = [f"{piece}  {score:.1f}, {weight:.0%}" for piece, score, weight in numbers]
heard = weights[:, None] * v[0, HEAD, : t + 1]
panels = {"query x key / √A": products[:, order], "weight x value": heard[:, order]}
pictures.heatmaps(panels, "entry", "score, weight", [""] * A, rows, numbers="")

# %% [markdown]
# ## What each position looks at
# The weights of all these positions, in the four heads of the first block. A row is a
# position that looks, a column one that is looked at. Above the diagonal everything is
# exactly 0: the future. Each head has a pattern of its own. Some rows look at the token
# before, as a table of pairs would. Others reach further back, to the beginning of the
# word or of the text.

# %%
weights = np.asarray(kept[0, :, : t + 1, : t + 1])
panels = {f"head {h}": weights[h] for h in range(HEADS)}
axes = ("looked at, in the same order", "looking", [""] * len(pieces), pieces)
pictures.heatmaps(panels, *axes, numbers="", diverging=False, height=3.2)
assert (np.triu(weights, 1) == 0.0).all()

# %% [markdown]
# ## Exercises
# In the terminal: `uv run python -m foundation derive feed_forward`, and then
# `uv run python -m foundation hunt 7`, which plants a bug of chapters 2 to 7 for you to
# find. `--seed` with a number gives a whole class the same one.

# %%
check("7.1", None)

# %%
check("7.2", None)

# %%
check("7.3", None)

# %% [markdown]
# # 9. The whole language model by hand
#
# Everything is derived. What is left is bookkeeping. We put the mixture of chapter 8
# into the transformer of chapter 7, write down its backward pass, and train two copies:
# one by our gradient, one by automatic differentiation. If every derivation is right,
# their loss curves are *one* curve. Then we ask how far the model is causal, and find a
# limit that is easy to overlook.
#
# The code is `foundation/block.py`, `foundation/transformer.py` and
# `foundation/train_by_hand.py`.
#
# ## The model
# With L blocks, and norm for RMSNorm or LayerNorm:
#
# $$x = \text{table}[\text{tokens}]$$
#
# $$a = x + \text{attention}(\text{norm}(x)), \qquad
# x \leftarrow a + \text{moe}(\text{norm}(a)) \qquad \text{(L times)}$$
#
# $$\text{logits} = \text{norm}(x)\,W_{head}$$
#
# $$\text{loss} = \text{cross-entropy} + c_b\, \frac1L\sum_l \text{balance}_l +
# c_z\, \frac1L \sum_l z_l$$
#
# The last two terms are the **auxiliary losses** of chapter 8, one for each layer's
# router, with small coefficients $c_b$ and $c_z$. They help training. A *reported* loss
# never contains them.
#
# ## The backward pass, in order
# 1. **The loss.** Its cotangent is 1. It is a sum, so the cross-entropy gets 1, each
#    layer's balance loss gets $c_b / L$, and each z-loss $c_z / L$. These constants
#    enter at *every* layer's router, long after this line. Forgetting the $1/L$ is a
#    planted bug.
# 2. **Cross-entropy** (chapter 4): $d_{logits} = (p - \text{onehot}) / n$.
# 3. **Head** (chapter 2): $d_{norm} = d_{logits} W_{head}^\top$. If the head is the
#    table transposed, this is the table's first contribution.
# 4. **The last norm** (chapter 6).
# 5. **Blocks, from the last to the first.** Each takes $d_y$ and gives $d_x$, and on
#    the way the gradients of its parameters. Inside a block, as in chapter 7: $d_a =
#    d_y + $ (what the mixture sends back), $d_x = d_a + $ (what attention sends back).
# 6. **Inside the mixture** (chapter 8): combine, experts, dispatch, router. The stream
#    went to the router *and* to the experts, so both parts add.
# 7. **The table** (chapter 6): add each position's gradient to the row that it read.
#    With a tied head this is the second contribution, and the two add.
#
# At each step the forward pass has left a cache. The caches are taken in reverse order.
# In the code this is a list, and `reversed(cache.blocks)`.
#
# ## One gradient, every parameter

# %%
from foundation import train_by_hand as lesson
from foundation import transformer
from foundation.block import ModelConfig, block_backward
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown
from foundation.parity import max_relative_error

shown(transformer.model_backward, block_backward)

# %%
config = ModelConfig(heads=4, capacity_factor=1.0)
size = transformer.ModelSize(vocabulary=0, width=32, layers=3, experts=6, hidden=24)
start = lesson.train(
    transformer.loss_and_gradient, steps=0, size=size, config=config
).params
window = lesson.batch(lesson.corpus().tokens, 0, 32)
inputs, targets = window[:, :-1], window[:, 1:]
by_hand_of, by_autodiff_of = (
    jax.jit(gradient, static_argnums=3)
    for gradient in (transformer.loss_and_gradient, lesson.by_autodiff)
)
loss, by_hand = by_hand_of(start, inputs, targets, config)
_, by_autodiff = by_autodiff_of(start, inputs, targets, config)
error = max_relative_error(by_hand, by_autodiff)
print(f"loss {loss:.4f}; {len(jax.tree.leaves(by_hand))} arrays of parameters")
print(f"largest relative difference from autodiff {error:.1e}")
assert error < 1e-10

# %% [markdown]
# How large are the gradients? Here is the root mean square of each array, at the start.
# The matrices of the mixture (red and blue) get gradients of $6 \cdot 10^{-5}$ to $2
# \cdot 10^{-4}$, less than a seventh of what those of attention get. There are three
# reasons. Each expert sees only a part of the tokens. Its answer is multiplied by a
# gate. And its matrices start small, so the product of three of them is tiny. An
# optimizer that takes steps in proportion to the gradient would hardly move them. Adam
# divides by the size of each gradient, which is one reason why everybody uses it or a
# relative of it.

# %%
flat = jax.tree_util.tree_leaves_with_path(by_hand)
names = [jax.tree_util.keystr(path, simple=True, separator=" ") for path, _ in flat]
rms = [float(jnp.sqrt(jnp.mean(gradient**2))) for _, gradient in flat]
pictures.sizes(names, rms, "at the start (red: routers, blue: experts)")

# %% [markdown]
# ## Trained by hand
# Two copies with one start and the same batches. One follows the hand-derived gradient,
# the other automatic differentiation. A step that is wrong by a billionth would show,
# because errors add up over the steps, and a router's choice can flip.

# %%
STEPS = 50
hand = lesson.train(transformer.loss_and_gradient, STEPS, size, 32, config)
automatic = lesson.train(lesson.by_autodiff, STEPS, size, 32, config)
print(f"largest difference {lesson.largest_difference(hand, automatic):.1e} nats")
assert lesson.largest_difference(hand, automatic) < 1e-9
difference = np.abs(np.array(hand.losses) - np.array(automatic.losses))
pictures.curves(
    {
        "two curves": {"by hand": hand.losses, "by autodiff": automatic.losses},
        "their difference": {"by hand - by autodiff": np.maximum(difference, 1e-17)},
    },
    xlabel="step",
    ylabel="nats per character",
    log=(False, True),
)

# %% [markdown]
# ## Causal, at a fixed length
# A language model is **causal** if the logits at position $t$ depend on tokens up to
# $t$ only. If they depended on later ones, training would be a fraud: the answer would
# be in the question. Attention has its mask. But there is a second way in which
# positions meet: they *compete for slots*. If a later token could take an earlier one's
# slot, the earlier output would depend on it, and no gradient would show this, since a
# choice has none.
#
# So it is tested by changing things. **Left:** change the token at one position (row)
# and see which logits (column) move. White means not by a single bit. Slots are given
# token by token, so a later token never takes an earlier one's slot, and everything
# before the change is white. This is true although many choices are dropped.
#
# **Right:** do not change the tokens after position $t$, but *cut them off*. Now
# earlier logits do move. The capacity $C = \lceil c\,TK/E \rceil$ depends on the length
# T. A shorter sequence has fewer slots, so an earlier token may lose its own. The layer
# is a function of the tokens up to $t$ *and of T*. It is causal at a fixed T. That is
# enough for training, where all sequences have one length. It would not be enough for
# writing, where the text grows; so evaluation and writing drop nothing. (White on the
# right: cut off, or moved by less than $10^{-12}$.)

# %%
T = 32
tight = ModelConfig(heads=4, capacity_factor=0.5)


@jax.jit
def logits_of(tokens):
    output, _ = transformer.model_forward(hand.params, tokens, tight)
    return output.logits[0], output.dropped


tokens = window[:1, :-1]
whole, dropped = logits_of(tokens)
other = (tokens + 1) % len(lesson.corpus().alphabet)
rows = list(range(0, T, 2))
changed = jnp.stack(
    [
        jnp.max(jnp.abs(logits_of(tokens.at[0, t].set(other[0, t]))[0] - whole), -1)
        for t in rows
    ]
)
lengths = [4, 8, 16, 24, 28]
cut = jnp.zeros((len(lengths), T)) * jnp.nan
for row, n in enumerate(lengths):
    moved = jnp.max(jnp.abs(logits_of(tokens[:, :n])[0] - whole[:n]), -1)
    moved = jnp.where(moved < 1e-12, 0.0, moved)  # other shapes, other rounding
    cut = cut.at[row, :n].set(moved)
pictures.changes(
    {
        "one token changed: white is unchanged": (changed, rows),
        "cut to a length: earlier logits move": (cut, lengths),
    },
    "position changed (left), length kept (right)",
)
assert all((changed[i, :t] == 0.0).all() for i, t in enumerate(rows))
print(f"{100 * dropped:.0f} % of the choices were dropped")
print(f"cut to {lengths[1]} tokens, logits move by up to {jnp.nanmax(cut[1]):.2f}")
assert jnp.nanmax(cut[1]) > 1e-3

# %% [markdown]
# ## The same, on a real model
# These files know nothing of the trained models of this project. Yet they can run one.
# If you have trained a model with `uv run train.py`, this reads its weights, computes
# its validation loss, and writes the story that the program itself would write:
#
# ```
# uv run python -m foundation run runs/nano
# ```
#
# Its loss agrees with the run's own to 1e-6, and the story to the letter. A test also
# holds the gradient of the *real* model against the one of this chapter, in every
# parameter (`tests/test_bridge.py`).
#
# ## Exercises
# And then: `uv run python -m foundation hunt 9` plants a bug somewhere in these files,
# and you have the table to find it.

# %%
check("9.1", None)

# %%
check("9.2", None)

# %%
check("9.3", None)

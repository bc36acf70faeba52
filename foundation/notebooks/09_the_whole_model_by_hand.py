# %% [markdown]
# # 9. The whole language model by hand
#
# What is left is bookkeeping. We put the mixture of chapter 8 into the transformer of
# chapter 7, write down its backward pass, and train two copies: one by our gradient,
# one by automatic differentiation. If every derivation is right, their loss curves are
# *one* curve. Then we ask how far the model is causal, and find a limit that is easy to
# overlook. The code is `foundation/transformer.py` and `foundation/train_by_hand.py`.
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
#
# ## One gradient, every parameter

# %%
from foundation import train_by_hand as lesson
from foundation import transformer
from foundation.lessons.notebook import agree, check, jax, jnp, np, pictures, shown

shown(transformer.model_backward, transformer.block_backward)

# %%
config = transformer.ModelConfig(heads=4, capacity_factor=1.0)
size = transformer.ModelSize(vocabulary=0, width=32, layers=3, experts=6, hidden=24)
start = lesson.train(transformer.loss_and_gradient, 0, size, config=config).params
window = lesson.batch(lesson.corpus().tokens, 0, 32)
inputs, targets = window[:, :-1], window[:, 1:]
by_hand_of, by_autodiff_of = (
    jax.jit(gradient, static_argnums=3)
    for gradient in (transformer.loss_and_gradient, lesson.by_autodiff)
)
loss, by_hand = by_hand_of(start, inputs, targets, config)
_, by_autodiff = by_autodiff_of(start, inputs, targets, config)
print(f"loss {loss:.4f}; {len(jax.tree.leaves(by_hand))} arrays of parameters")
agree("by hand and by autodiff", by_hand, by_autodiff, 1e-10)

# %% [markdown]
# How large are the gradients? Here is the root mean square of each array of one block,
# at the start. The matrices of the mixture get less than a seventh of what those of
# attention get: each expert sees only a part of the tokens, its answer is multiplied by
# a gate, and its matrices start small. Gradient descent would hardly move them. Adam
# divides by the size of each gradient, one reason why everybody uses it or a relative.

# %%
for path, gradient in jax.tree_util.tree_leaves_with_path(by_hand["blocks"][1]):
    name = jax.tree_util.keystr(path, simple=True, separator=" ")
    print(f"{name:<22} {jnp.sqrt(jnp.mean(gradient**2)):.1e}")

# %% [markdown]
# ## Trained by hand
# Two copies with one start and the same batches. A step that is wrong by a billionth
# would show, because errors add up over the steps, and a router's choice can flip. (A
# logarithmic axis has no 0: where the losses are equal, the picture shows $10^{-17}$.)

# %%
STEPS = 50
hand = lesson.train(transformer.loss_and_gradient, STEPS, size, 32, config)
automatic = lesson.train(lesson.by_autodiff, STEPS, size, 32, config)
print(f"largest difference {lesson.largest_difference(hand, automatic):.1e} nats")
assert lesson.largest_difference(hand, automatic) < 1e-9
difference = np.abs(np.array(hand.losses) - np.array(automatic.losses))
panels = {
    "two curves": {"by hand": hand.losses, "by autodiff": automatic.losses},
    "their difference": {"by hand - by autodiff": np.maximum(difference, 1e-17)},
}
pictures.curves(panels, "step", "nats per character", log=(False, True))

# %% [markdown]
# ## Causal, at a fixed length
# A language model is **causal** if the logits at position $t$ depend on tokens up to
# $t$ only. If they depended on later ones, training would be a fraud: the answer would
# be in the question. Attention has its mask. But there is a second way in which
# positions meet: they *compete for slots*. If a later token could take an earlier one's
# slot, the earlier output would depend on it, and no gradient would show this, since a
# choice has none.
#
# So it is tested by changing things. First **change** a token. Slots are given token by
# token, so a later token never takes an earlier one's slot: no logit before the change
# moves, not by a single bit. This is true although many choices are dropped.
#
# Then **cut off** the same token and all after it. Now earlier logits do move. The
# capacity $C = \lceil c\,TK/E \rceil$ depends on the length T. A shorter sequence has
# fewer slots, so an earlier token may lose its own. The layer is causal *at a fixed T*.
# That is enough for training, where all sequences have one length, but not for writing,
# where the text grows; so evaluation and writing drop nothing (chapter 12).

# %%
tight = transformer.ModelConfig(heads=4, capacity_factor=0.5)


@jax.jit
def logits_of(tokens):
    output, _ = transformer.model_forward(hand.params, tokens, tight)
    return output.logits[0], output.dropped


tokens = window[:1, :-1]
whole, dropped = logits_of(tokens)
print(f"{dropped:.0%} of the choices are dropped. Logits before token t move by")
for t in (4, 8, 16, 24):
    other = (tokens[0, t] + 1) % len(lesson.corpus().alphabet)
    changed, cut = logits_of(tokens.at[0, t].set(other))[0], logits_of(tokens[:, :t])[0]
    by_change, by_cut = (jnp.max(jnp.abs(x[:t] - whole[:t])) for x in (changed, cut))
    print(f"t = {t:2}: changed {by_change}, cut off {by_cut:.2f}")
    assert by_change == 0.0
    assert by_cut > 1e-3

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

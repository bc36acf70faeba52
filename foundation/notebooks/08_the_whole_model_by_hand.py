# %% [markdown]
# # 8. The whole language model by hand
#
# $$x = \text{embed}(tokens);\quad a = x + \text{attn}(\text{norm}(x));\quad x' = a + \text{moe}(\text{norm}(a));
# \quad \text{logits} = \text{norm}(x)\,W_{head}$$
#
# $$L = \text{cross-entropy} + c_b\,\frac1L\sum_l \text{balance}_l + c_z\,\frac1L\sum_l \text{z}_l$$
#
# Nothing new is to be derived: the backward pass is the forward pass from the end to the start, each line replaced by
# its adjoint, and a plus wherever a value was used twice. Code: `foundation/block.py`, `foundation/transformer.py`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from foundation import train_by_hand as lesson
from foundation.block import ModelConfig
from foundation.exercises import ask, check
from foundation.parity import max_relative_error
from foundation.transformer import ModelSize, loss_and_gradient, model_forward

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## One gradient, every parameter

# %%
config = ModelConfig(heads=4, capacity_factor=1.0)
size = ModelSize(vocabulary=0, width=32, layers=3, experts=6, hidden=24)
start = lesson.train(loss_and_gradient, steps=0, size=size, config=config).params
window = lesson.batch(lesson.corpus().tokens, 0, 32)
loss, ours = loss_and_gradient(start, window[:, :-1], window[:, 1:], config)
_, theirs = lesson.by_autodiff(start, window[:, :-1], window[:, 1:], config)
error = max_relative_error(ours, theirs)
print(f"loss {loss:.4f}; {len(jax.tree.leaves(ours))} arrays; largest relative difference from autodiff {error:.1e}")
assert error < 1e-10

# %%
flat = jax.tree_util.tree_leaves_with_path(ours)
names = [jax.tree_util.keystr(path, simple=True, separator=" ") for path, _ in flat]
rms = [float(jnp.sqrt(jnp.mean(grad**2))) for _, grad in flat]
figure, ax = plt.subplots(figsize=(9, 6.6), layout="constrained")
colours = ["#c8553d" if "router" in n else "#3d7ea6" if "w_" in n else "#8a9a5b" for n in names]
ax.barh(names, rms, color=colours)
ax.invert_yaxis()
ax.set(xscale="log", xlabel="root mean square of the gradient", title="at the start (red: routers, blue: experts)")
ax.tick_params(axis="y", labelsize=8)
plt.show()

# %% [markdown]
# ## Trained by hand
# Two copies, one start, the same batches: one follows the hand-derived gradient, the other automatic differentiation.

# %%
steps = 50
by_hand = lesson.train(loss_and_gradient, steps, size, 32, config)
automatic = lesson.train(lesson.by_autodiff, steps, size, 32, config)
difference = [abs(a - b) for a, b in zip(by_hand.losses, automatic.losses, strict=True)]
print(f"largest difference of the two curves: {max(difference):.1e} nats")
assert max(difference) < 1e-9

figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, height_ratios=[2, 1], layout="constrained")
top.plot(by_hand.losses, lw=6, color="#9cc3ee", label="by hand")
top.plot(automatic.losses, lw=1.4, color="#12355b", label="by autodiff")
top.set_ylabel("training loss (nats per character)")
top.legend(frameon=False)
bottom.semilogy([max(d, 1e-17) for d in difference], color="#c8553d")
bottom.set(xlabel="step", ylabel="difference", ylim=(1e-17, 1e-8))
plt.show()

# %% [markdown]
# ## Causal, drops included
# Change one character and see which logits move. Those before it must not, not by one bit: slots are given token by
# token, so a later token never takes an earlier one's.

# %%
forward = jax.jit(lambda tokens: model_forward(by_hand.params, tokens, config)[0])
tokens = window[:1, :-1]
before = forward(tokens)
moved = []
for t in range(0, 32, 2):
    after = forward(tokens.at[0, t].set((tokens[0, t] + 1) % len(lesson.corpus().alphabet)))
    moved.append(jnp.max(jnp.abs(after.logits - before.logits), axis=-1)[0])
moved = jnp.stack(moved)
figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
shown = jnp.where(moved == 0.0, jnp.nan, jnp.log10(jnp.where(moved == 0.0, 1.0, moved)))
image = ax.imshow(shown, aspect="auto", cmap="viridis", extent=(-0.5, 31.5, 31, -1))
figure.colorbar(image, ax=ax, label="log10 of the largest change of a logit")
ax.set(xlabel="position of the logits", ylabel="position changed", title="white: exactly unchanged")
plt.show()
assert all((row[:t] == 0.0).all() for t, row in zip(range(0, 32, 2), moved, strict=True))
print(f"{100 * before.dropped:.0f} % of choices were dropped in this sequence")

# %% [markdown]
# ## Exercises

# %%
ask("8.1")
check("8.1", None)
ask("8.2")
check("8.2", None)

# %% [markdown]
# # 2. Back-propagation: two layers learn XOR
#
# With arrays the local derivatives become matrices, but nobody writes them out. For $y = xW + b$, entry by entry,
# $y_{ro} = \sum_i x_{ri} W_{io} + b_o$, so
#
# $$d_x = d_y W^\top, \qquad d_W = x^\top d_y, \qquad d_b = \sum_r d_{y,r}$$
#
# where $d_y$ is short for $\partial L / \partial y$. `foundation/linear.py` derives it; the whole lesson is
# `foundation/backprop_from_scratch.py`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from foundation import backprop_from_scratch as lesson
from foundation.exercises import ask, check
from foundation.parity import Check, run

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Forward, then backward
# Four lines forward, and the same four from the last to the first, each replaced by its backward pass.

# %%
params = lesson.init_params(jax.random.key(0))
loss, cache = lesson.loss_forward(params)
grads = lesson.loss_backward(jnp.ones_like(loss), cache)
print(f"loss {loss:.4f}")
for name, grad in grads.items():
    print(f"d_{name}, {grad.shape}:", str(jnp.round(grad, 4)).replace("\n", ""))

# %% [markdown]
# ## Against the framework

# %%
by_jax = jax.grad(lambda p: lesson.loss_forward(p)[0])(params)
for name in grads:
    print(f"d_{name}: largest difference from jax.grad {jnp.max(jnp.abs(grads[name] - by_jax[name])):.1e}")
assert run(Check("xor", "two layers", lesson.loss_forward, lesson.loss_backward, (params,))).passed

# %% [markdown]
# ## Learning, and a bug that learns too
# A mean loss divides by the batch, once, in its own backward pass. Dividing $d_W$ by the batch again is the commonest
# bug of hand-written back-propagation. Its loss falls as well, only more slowly, so the curve does not show it. The
# check does.

# %%
right, wrong = lesson.train(), lesson.train(lesson.loss_backward_dividing_twice)
outcome = run(Check("xor", "divided twice", lesson.loss_forward, lesson.loss_backward_dividing_twice, (params,)))
print(f"right: {lesson.correct(right.params)} of 4; relative error of the bug's gradient: {outcome.autodiff:.2f}")
assert not outcome.passed

figure, (left, middle) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.semilogy(right.losses, label="as derived")
left.semilogy(wrong.losses, label="divided by the batch twice")
left.set(xlabel="step", ylabel="mean squared error")
left.legend(frameon=False)
image = middle.imshow(lesson.boundary(right.params, 161), extent=(-0.5, 1.5, -0.5, 1.5), cmap="RdBu_r", vmin=0, vmax=1)
for (x1, x2), target in zip(lesson.INPUTS.tolist(), lesson.TARGETS[:, 0].tolist(), strict=True):
    middle.plot(x1, x2, "o", ms=11, mfc="#b2182b" if target else "#2166ac", mec="white", mew=1.8)
middle.set(xlabel="first input", ylabel="second input", title="the output over the plane")
figure.colorbar(image, ax=middle)
plt.show()

# %% [markdown]
# ## What the first layer did
# No line separates the classes in the plane of the inputs. In the space of the hidden units one does. Here are the
# four points there, on their two main axes.

# %%
hidden = jnp.tanh(lesson.INPUTS @ right.params["w1"] + right.params["b1"])
centred = hidden - hidden.mean(axis=0)
_, _, axes_of_hidden = jnp.linalg.svd(centred, full_matrices=False)
flat = centred @ axes_of_hidden[:2].T
figure, ax = plt.subplots(figsize=(5, 4))
for point, (x1, x2), target in zip(flat.tolist(), lesson.INPUTS.tolist(), lesson.TARGETS[:, 0].tolist(), strict=True):
    ax.plot(*point, "o", ms=12, color="#b2182b" if target else "#2166ac")
    ax.annotate(f"  ({x1:.0f}, {x2:.0f})", point)
ax.set(xlabel="first main axis of the hidden units", ylabel="second", title="red: XOR = 1")
ax.margins(0.25)
plt.show()

# %% [markdown]
# ## Exercises

# %%
ask("2.1")
check("2.1", None)
ask("2.2")
check("2.2", None)

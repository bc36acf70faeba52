# %% [markdown]
# # 2. Back-propagation: two layers learn XOR
#
# XOR is 1 if exactly one of two inputs is 1. In 1969 it was the famous example of what
# a single layer cannot learn: no straight line separates the two classes. In 1986 it
# was the example of what two layers *can* learn, with the gradients of this chapter. We
# derive the gradients of the affine layer, the most used operation of all, train the
# net, and then plant the commonest bug of hand-written back-propagation.
#
# The code is `foundation/linear.py` and `foundation/backprop_from_scratch.py`.
#
# ## The affine layer, entry by entry
# An **affine layer** computes $y = xW + b$. $x$ is [B, I]: B examples, the **batch**,
# of I numbers each. $W$ is [I, O], the **kernel** or weight matrix. $b$ is [O], the
# **bias**, added to every row. Do not try to differentiate a matrix by a matrix. Write
# out one entry, for row $r$ and output $o$:
#
# $$y_{ro} = \sum_i x_{ri} W_{io} + b_o.$$
#
# We know the cotangent $d_y = \partial L / \partial y$, [B, O], one number for each
# entry of $y$. For each input ask: which entries of $y$ does it enter, and with which
# factor?
#
# **Step 1, the input.** $x_{ri}$ enters $y_{ro}$ for every $o$ of its own row, with the
# factor $W_{io}$. Sum over these:
#
# $$\frac{\partial L}{\partial x_{ri}} = \sum_o (d_y)_{ro} W_{io}
# \quad\Rightarrow\quad d_x = d_y W^\top$$
#
# **Step 2, the kernel.** $W_{io}$ enters $y_{ro}$ for every row $r$, with the factor
# $x_{ri}$. It is used B times, so B contributions add:
#
# $$\frac{\partial L}{\partial W_{io}} = \sum_r x_{ri} (d_y)_{ro}
# \quad\Rightarrow\quad d_W = x^\top d_y$$
#
# **Step 3, the bias.** $b_o$ enters every row with the factor 1:
#
# $$\frac{\partial L}{\partial b_o} = \sum_r (d_y)_{ro}$$
#
# The shapes leave no other choice, which is a good way to remember it. $d_W$ must be
# [I, O], and of the products of $x$ and $d_y$ only $x^\top d_y$ is.
#
# **What is not there** is a division by the number of rows. If the loss is a mean over
# the batch, then the *loss's own* backward pass has put $1/B$ into $d_y$ already. More
# about this below.

# %%
import jax
import jax.numpy as jnp

from foundation import backprop_from_scratch as lesson
from foundation.exercises import ask, check
from foundation.lessons import pictures
from foundation.linear import linear_backward, linear_forward
from foundation.parity import Check, run

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# The three lines of code are the three formulas. `linear_forward` also returns a cache:
# $x$ and $W$, which the backward pass needs. The check compares with `jax.grad` and
# with finite differences, for a random cotangent (chapter 0).

# %%
x, W = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 3), (3, 5)]))
y, cache = linear_forward(x, W, jnp.zeros(5))
d_y = jax.random.normal(jax.random.key(2), y.shape)
d_x, d_W, d_b = linear_backward(d_y, cache)
assert (d_b == d_y.sum(axis=0)).all()
print("shapes:", d_x.shape, d_W.shape)
outcome = run(Check("linear", "", linear_forward, linear_backward, (x, W, jnp.ones(5))))
print(f"{outcome.autodiff:.1e} from autodiff")
assert outcome.passed

# %% [markdown]
# ## The net, forward and backward
# Two affine layers with a tanh between them, a sigmoid at the end (both in chapter 3),
# and the mean squared error over the four points:
#
# $$a = xW_1 + b_1,\quad h = \tanh a,\quad c = hW_2 + b_2,\quad y = \sigma(c),\quad
# L = \frac14 \sum_r (y_r - t_r)^2$$
#
# Backward there is nothing to invent. Take the lines from the last to the first, and
# replace each by its backward pass:
#
# 1. $d_y = \frac{2}{4}(y - t)$. *Here* is the $1/4$ of the mean, and only here.
# 2. $d_c = d_y \odot y(1-y)$, the slope of the sigmoid.
# 3. $d_h = d_c W_2^\top$, and on the way $d_{W_2} = h^\top d_c$, $d_{b_2} = \sum_r
#    d_c$.
# 4. $d_a = d_h \odot (1 - h^2)$, the slope of the tanh.
# 5. $d_{W_1} = x^\top d_a$, and $d_{b_1} = \sum_r d_a$.
#
# In the code these are four calls (`net_backward`).

# %%
params = lesson.init_params(jax.random.key(0))
loss, cache = lesson.loss_forward(params)
grads = lesson.loss_backward(jnp.ones_like(loss), cache)
by_jax = jax.grad(lambda p: lesson.loss_forward(p)[0])(params)
print(f"loss {loss:.4f}")
for name in grads:
    error = jnp.max(jnp.abs(grads[name] - by_jax[name]))
    print(f"d_{name} {grads[name].shape!s:>7}: {error:.1e} from jax.grad")
xor = Check("xor", "two layers", lesson.loss_forward, lesson.loss_backward, (params,))
assert run(xor).passed

# %% [markdown]
# ## Learning, and a bug that learns too
# **Gradient descent** moves every parameter a small step against its gradient: $W
# \leftarrow W - \text{lr} \cdot d_W$. The step length lr is the **learning rate**.
# The code adds **momentum**: in place of $d_W$ it steps by a velocity,
# $v \leftarrow 0.9\,v + d_W$, which is faster. After 400 steps the net has learned XOR.
#
# Now the bug. A mean loss divides by the batch, once, in its own backward pass (line 1
# above). Many people divide $d_W$ by the batch once more, "because the gradient is a
# mean over examples". The wrong gradient points in nearly the right direction, only it
# is too short for the weights and right for the biases. So the loss falls as well, only
# more slowly. **A falling loss is no proof of a gradient.** You would blame the
# learning rate, and live with the bug for years.
#
# The check is not deceived. The relative error is $|g - g/4| / |g| = 0.75$.

# %%
right, wrong = lesson.train(), lesson.train(lesson.loss_backward_dividing_twice)
planted = Check(
    "xor", "twice", lesson.loss_forward, lesson.loss_backward_dividing_twice, (params,)
)
outcome = run(planted)
print(f"{lesson.correct(right.params)} of 4 points right;", end=" ")
print(f"relative error of the bug's gradient: {outcome.autodiff:.2f}")
assert not outcome.passed
pictures.curves(
    {"both fall": {"as derived": right.losses, "divided twice": wrong.losses}},
    xlabel="step",
    ylabel="mean squared error",
    log=True,
)

# %% [markdown]
# ## What the first layer did
# Red corners lie on one diagonal of the square, blue ones on the other, and no straight
# line separates them. The net's output over the plane is not cut by a line: a blue
# valley runs between two red hills.

# %%
corners = [
    (*point, target)
    for point, (target,) in zip(lesson.INPUTS, lesson.TARGETS, strict=True)
]
pictures.plane(lesson.boundary(right.params, 161), corners, "red: the net says 1")

# %% [markdown]
# How does it do that? The last layer *is* only a line (then a sigmoid). So the first
# layer must have moved the points to places where a line suffices. Here are the four
# points as the last layer sees them: their hidden units $h$, four numbers each, drawn
# on the two axes along which they differ most. Now a line separates red from blue. This
# is what hidden layers are for, in this net and in the largest: they move things until
# a simple rule is enough.

# %%
inputs = jnp.asarray(lesson.INPUTS)
hidden = jnp.tanh(inputs @ right.params["w1"] + right.params["b1"])
centred = hidden - hidden.mean(axis=0)
_, _, main_axes = jnp.linalg.svd(centred, full_matrices=False)
pictures.points(
    centred @ main_axes[:2].T,
    [f"({a:.0f}, {b:.0f})" for a, b in lesson.INPUTS],
    [bool(target) for (target,) in lesson.TARGETS],
    "first main axis of the hidden units",
    "second",
    "red: XOR = 1",
)

# %% [markdown]
# ## Exercises
# Then write the whole backward pass yourself, and see what the check says to it:
# `uv run python -m foundation derive linear`.

# %%
ask("2.1")
check("2.1", None)
ask("2.2")
check("2.2", None)
ask("2.3")
check("2.3", None)

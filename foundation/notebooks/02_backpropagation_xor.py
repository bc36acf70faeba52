# %% [markdown]
# # 2. Back-propagation: two layers learn XOR
#
# XOR is 1 if exactly one of two inputs is 1. In 1969 it was the famous example of what
# a single layer cannot learn: no straight line separates the two classes. In 1986 it
# was the example of what two layers *can* learn, with the gradients of this chapter. We
# derive those of the affine layer, the most used operation of all, train the net, and
# plant the commonest bug of hand-written back-propagation. The code is
# `foundation/linear.py`.
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
from foundation.lessons.notebook import agree, check, checked, jax, jnp, pictures, shown
from foundation.linear import linear_backward, linear_forward

shown(linear_forward, linear_backward)

# %% [markdown]
# The letters are those of the derivation, with `kernel` for $W$. The **cache** is what
# the forward pass keeps for the backward pass: $x$ and $W$.
#
# **More axes in front.** In a language model $x$ is [B, T, I]: a row is a position of a
# sequence, and there are B T of them. Nothing in the derivation asks what a row is. So
# `@` takes $d_y W^\top$ for any number of axes in front, and the sums over $r$ run over
# *all* of them. The code makes one axis of them, [B T, I] and [B T, O], and then the
# two formulas are those from above. With $x^\top d_y$ sequence by sequence, the result
# would be [B, I, O], which is not the shape of $W$: the sum over B would be missing.
#
# The check of chapter 0, with a random cotangent:

# %%
W = jax.random.normal(jax.random.key(1), (3, 5))
for shape in ((4, 3), (2, 4, 3)):
    x = jax.random.normal(jax.random.key(0), shape)
    checked(f"x {shape}", linear_forward, linear_backward, (x, W, jnp.ones(5)))

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
# These are the five lines of `loss_backward`.

# %%
X = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
t = jnp.array([[0.0], [1.0], [1.0], [0.0]])


def net(params, x):
    h = jnp.tanh(x @ params["W1"] + params["b1"])
    y = jax.nn.sigmoid(h @ params["W2"] + params["b2"])
    return h, y


def loss_forward(params):
    h, y = net(params, X)
    return jnp.mean((y - t) ** 2), (params["W2"], h, y)


def loss_backward(d_loss, cache):
    W2, h, y = cache
    d_y = d_loss * 2 / 4 * (y - t)
    d_c = d_y * y * (1 - y)
    d_h, d_W2, d_b2 = d_c @ W2.T, h.T @ d_c, d_c.sum(axis=0)
    d_a = d_h * (1 - h**2)
    d_W1, d_b1 = X.T @ d_a, d_a.sum(axis=0)
    return {"W1": d_W1, "b1": d_b1, "W2": d_W2, "b2": d_b2}


W1, W2 = (
    jax.random.uniform(jax.random.key(i), shape, minval=-1.0)  # Xavier, chapter 3
    for i, shape in enumerate([(2, 4), (4, 1)])
)
params = {"W1": W1, "b1": jnp.zeros(4), "W2": W2, "b2": jnp.zeros(1)}
checked("the net", loss_forward, loss_backward, (params,))

# %% [markdown]
# ## Learning, and a bug that learns too
# **Gradient descent** moves every parameter a small step against its gradient: $W
# \leftarrow W - \text{lr} \cdot d_W$. The step length lr is the **learning rate**.
# The code adds **momentum**: in place of $d_W$ it steps by a velocity,
# $v \leftarrow 0.9\,v + d_W$, which is faster. After 400 steps the net has learned XOR.
#
# Now the bug. A mean loss divides by the batch, once, in its own backward pass (line 1
# above). Many people divide $d_W$ by the batch once more, "because the gradient is a
# mean over examples". The wrong gradient is too short for the weights and right for the
# biases, so the loss falls as well, only more slowly. **A falling loss is no proof of a
# gradient.** You would blame the learning rate, and live with the bug for years. The
# check is not deceived: the relative error is $|g - g/4| / |g| = 0.75$.


# %%
def divided_twice(d_loss, cache):
    right = loss_backward(d_loss, cache)
    return {n: g / 4 if n.startswith("W") else g for n, g in right.items()}


def trained(backward):
    @jax.jit
    def step(params, velocity):
        loss, cache = loss_forward(params)
        gradient = backward(1.0, cache)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        return jax.tree.map(lambda p, v: p - 0.5 * v, params, velocity), velocity, loss

    now, velocity, losses = params, jax.tree.map(jnp.zeros_like, params), []
    for _ in range(400):
        now, velocity, loss = step(now, velocity)
        losses.append(float(loss))
    return now, losses


(right, losses), (_, slower) = trained(loss_backward), trained(divided_twice)
assert ((net(right, X)[1] > 0.5) == t).all()  # all four points
assert slower[-1] < 0.5 * slower[0]
_, cache = loss_forward(params)
wrong, good = divided_twice(1.0, cache), loss_backward(1.0, cache)
agree("the bug's gradient and the right one", wrong, good, within=0.76)
both = {"as derived": losses, "divided twice": slower}
pictures.curves({"both fall": both}, "step", "mean squared error", log=True)

# %% [markdown]
# ## What the first layer did
# Red corners lie on one diagonal of the square, blue ones on the other, and no straight
# line separates them. In the net's output a red ridge runs between two blue plains.

# %%
line = jnp.linspace(-0.5, 1.5, 161)
square = jnp.stack(jnp.meshgrid(line, line[::-1]), axis=-1)
corners = jnp.concatenate([X, t], axis=1).tolist()
pictures.plane(net(right, square)[1][..., 0], corners, "red: the net says 1")

# %% [markdown]
# How does it do that? The last layer *is* only a line (then a sigmoid). So the first
# layer must have moved the points to places where a line suffices. Here are the four
# points as the last layer sees them, with four hidden units $h$ each. To the right is
# the direction of $W_2$, the only one that the last layer looks at. Upwards is the
# direction across it in which the points differ most. The dashed line is where the net
# answers 1/2. This is what hidden layers are for, in this net and in the largest: they
# move things until a simple rule is enough.

# %%
hidden, _ = net(right, X)
length = jnp.linalg.norm(right["W2"])
direction, half = right["W2"][:, 0] / length, float(-right["b2"][0] / length)
seen = hidden @ direction
rest = hidden - seen[:, None] * direction
_, _, main_axes = jnp.linalg.svd(rest - rest.mean(axis=0))
places = jnp.stack([seen, rest @ main_axes[0]], axis=1)
names = [f"({a:.0f}, {b:.0f})" for a, b in X]
pictures.points(places, names, t[:, 0] == 1, half, "along W2", "across W2")
assert ((seen > half) == t[:, 0]).all()

# %% [markdown]
# ## Exercises
# Then write the whole backward pass yourself, and see what the check says to it:
# `uv run python -m foundation derive linear`.

# %%
check("2.1", None)

# %%
check("2.2", None)

# %%
check("2.3", None)

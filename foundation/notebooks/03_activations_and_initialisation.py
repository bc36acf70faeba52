# %% [markdown]
# # 3. Activations and initialisation: what twenty layers do to a signal
#
# Two affine layers in a row are one affine layer: $(xW_1)W_2 = x(W_1 W_2)$. To gain
# anything from depth, something that is not affine must stand between them: an
# **activation** function, applied to each number by itself. We derive the slopes of six
# of them, and look at each. Then we ask what twenty layers do to the size of a signal,
# and of a gradient. The answer decides with which random numbers a net must start.
#
# The code is `foundation/activations.py` and `foundation/initializers.py`.
#
# ## An elementwise function has a diagonal Jacobian
# Let $y_i = f(x_i)$ for every entry. Then $y_i$ depends on $x_i$ alone, so the Jacobian
# has $f'(x_i)$ on its diagonal and 0 everywhere else. The vector-Jacobian product is a
# product entry by entry:
#
# $$d_x = d_y \odot f'(x)$$
#
# What differs is from *what* $f'$ is computed most cheaply. This decides what the cache
# has to hold.
#
# **tanh.** The quotient rule on $\tanh = \sinh/\cosh$ gives $(\cosh^2 -
# \sinh^2)/\cosh^2 = 1 - \tanh^2$. So $f' = 1 - y^2$, from the *output* alone. The input
# may be forgotten:

# %%
from foundation import activations, initializers, linear
from foundation.lessons.notebook import check, jax, jnp, pictures, shown

shown(activations.tanh_forward, activations.tanh_backward)

# %% [markdown]
# **sigmoid.** $y = 1/(1 + e^{-x})$. By the chain rule $y' = e^{-x}/(1 + e^{-x})^2$. One
# factor is $y$. The other is $e^{-x}/(1+e^{-x}) = 1 - y$. So $f' = y(1-y)$, again from
# the output.
#
# **ReLU.** $y = \max(x, 0)$: slope 1 where $x > 0$, and 0 where $x < 0$. At $x = 0$
# there is a kink, and no derivative. We take 0 there, as everybody does.


# %%
def drawn(*names):
    """Activations and their slopes, which are held against autodiff."""
    x = jnp.linspace(-4.0, 4.0, 400)
    panels = {}
    for name in names:
        forward, backward = activations.ACTIVATIONS[name]
        y, cache = forward(x)
        slope = backward(jnp.ones_like(x), cache)
        by_jax = jax.vmap(jax.grad(lambda v, f=forward: f(v)[0]))(x)
        assert jnp.max(jnp.abs(slope - by_jax)) < 1e-14
        panels[name] = {"f": (x, y), "its slope": (x, slope)}
    pictures.curves(panels)


drawn("tanh", "sigmoid", "relu")

# %% [markdown]
# Look at the red lines. tanh and sigmoid are flat on both sides: far from 0 their
# slope vanishes, and a gradient that passes there dies. The slope of the sigmoid is
# never above 1/4, so twenty of them in a row leave at most $4^{-20} = 10^{-12}$ of a
# gradient. ReLU passes a gradient whole or not at all. The other three are smooth
# versions of it:
#
# **SiLU.** $y = x\,s$ with $s = \sigma(x)$. Product rule, with $s' = s(1-s)$: $f' = s +
# x\,s(1-s) = s\,(1 + x(1-s))$.
#
# **GELU, exact.** $y = x\,\Phi(x)$, where $\Phi$ is the probability that a standard
# normal number is below $x$. Its derivative is the normal density $\phi(x) = e^{-x^2/2}
# / \sqrt{2\pi}$. Product rule: $f' = \Phi(x) + x\,\phi(x)$.
#
# **GELU, as it is used**, replaces $\Phi$ by $(1+\tanh u)/2$ with $u = \sqrt{2/\pi}\,(x
# + 0.044715\,x^3)$. With $t = \tanh u$, the product and chain rules give $f' = (1+t)/2
# + \frac{x}{2}(1-t^2)\,u'$, and $u' = \sqrt{2/\pi}\,(1 + 3 \cdot 0.044715\,x^2)$.
# Forgetting the 3 is a bug that is hard to see in a curve, and that the check sees at
# once. In the code $u'$ is `d_u`.

# %%
drawn("silu", "gelu_exact", "gelu")

# %%
shown(activations.gelu_forward, activations.gelu_backward)

# %% [markdown]
# ## The variance of a signal
# Now the affine layer. Let the $x_i$ have the mean square $q$. They need not be
# independent, nor have the mean 0: after a ReLU they have not. Let the $W_{io}$ be
# independent of each other and of $x$, with mean 0 and variance $v$. One output is $y_o
# = \sum_i x_i W_{io}$, a sum of $I$ terms. What is its mean square?
#
# 1. Squaring the sum gives squares and mixed terms: $y_o^2 = \sum_{i,j} x_i x_j W_{io}
#    W_{jo}$.
# 2. A mixed term, $i \ne j$, has mean $E[x_i x_j]\,E[W_{io}]\,E[W_{jo}] = 0$.
# 3. A square has mean $E[x_i^2]\,E[W_{io}^2] = q\,v$, and there are $I$ of them.
#
# So a layer multiplies the mean square by $I \cdot v$. $I$ is called **fan-in**: how
# many inputs an output collects. Backward, $d_x = d_y W^\top$ is the same sum with the
# roles exchanged: an input collects from $O$ outputs, the **fan-out**. So the mean
# square of a gradient is multiplied by
#
# $$\text{fan-in} \cdot v \;\text{ forward}, \qquad \text{fan-out} \cdot v
# \;\text{ backward}.$$
#
# And a ReLU between two layers? Let each $W_{io}$ be as often $w$ as $-w$. Then $y_o$
# is as often positive as negative, with the same squares, and ReLU keeps one half of
# them: $E[\mathrm{relu}(y)^2] = \tfrac12 E[y^2]$. So the forward factor is
# $\tfrac12\,\text{fan-in} \cdot v$, and $v = 2/\text{fan-in}$ makes it 1.
#
# Twenty layers raise this factor to the twentieth power. A factor of 0.5 leaves a
# millionth; a factor of 2 makes a million. It has to be 1, or very nearly. The usual
# ways to choose $v$, most of them named after their authors:
#
# | name | variance | reason |
# |---|---|---|
# | LeCun | 1 / fan-in | keeps the forward signal, if the activation does |
# | Xavier | 2 / (fan-in + fan-out) | a compromise between both directions |
# | He | 2 / fan-in | ReLU halves the mean square; the 2 makes up for it |
# | normal | $0.02^2$ | GPT-2's choice, whatever the width |
#
# What the random generator gives agrees with what is promised:

# %%
shape = (400, 300)
for name in initializers.INITIALIZERS:
    measured = jnp.var(initializers.initialised(name, jax.random.key(0), shape))
    promised = initializers.predicted_variance(name, shape)
    print(f"{name:<8} predicted {promised:.6f}   measured {measured:.6f}")

# %% [markdown]
# ## Twenty layers
# Left is the mean square of the signal after each layer. Right is that of the gradient
# on its way back, computed by the hand-derived passes: read it from right to left. The
# scale is logarithmic, so a constant factor per layer is a straight line.

# %%
LAYERS, WIDTH = 20, 128


def through(initializer, activation):
    key = jax.random.key(1)
    forward, backward = activations.ACTIVATIONS[activation]
    h = jax.random.normal(key, (64, WIDTH))
    signal, caches = [jnp.mean(h**2)], []
    for k in jax.random.split(key, LAYERS):
        W = initializers.initialised(initializer, k, (WIDTH, WIDTH))
        z, affine = linear.linear_forward(h, W)
        h, elementwise = forward(z)
        caches.append((affine, elementwise))
        signal.append(jnp.mean(h**2))
    d_h = jax.random.normal(jax.random.key(2), h.shape)
    gradient = [jnp.mean(d_h**2)]
    for affine, elementwise in reversed(caches):
        d_h, _, _ = linear.linear_backward(backward(d_h, elementwise), affine)
        gradient.append(jnp.mean(d_h**2))
    return jnp.array(signal), jnp.array(gradient[::-1])


pairs = [("he", "relu"), ("lecun", "relu"), ("normal", "relu")]
pairs += [("xavier", "tanh"), ("he", "gelu")]
both = {f"{start}, {function}": through(start, function) for start, function in pairs}
panels = {
    way: {label: found[n] for label, found in both.items()}
    for n, way in enumerate(("signal, forward", "gradient, backward"))
}
pictures.curves(panels, "layer", "mean square", log=True, markers=True)
signal, _ = both["he, relu"]
worst = max(signal.max() / signal[0], signal[0] / signal.min())
print(f"He and ReLU keep the signal within a factor {worst:.1f}")
print(f"std 0.02 and ReLU leave {both['normal, relu'][0][-1]:.1e} of it")
assert both["lecun, relu"][0][-1] < 1e-4

# %% [markdown]
# ## What a residual stream changes
# A transformer *adds* each branch to a stream instead of replacing it (chapter 7). Then
# nothing vanishes, but the stream grows: each of the $2L$ branches adds its own
# variance. A branch that ends in $hW$ adds fan-in $\cdot E[h^2] \cdot \text{Var}(W)$.
# GPT-2 divides the variance of these last matrices by $2L$. So all branches together
# add as much as one of them would have added alone, fan-in $\cdot E[h^2] \cdot
# \text{std}^2$, whatever the depth. (Not $\text{std}^2$: the fan-in stays. A test in
# `tests/foundation` measures it.)
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive gelu`.

# %%
check("3.1", None)

# %%
check("3.2", None)

# %%
check("3.3", None)

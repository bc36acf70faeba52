# %% [markdown]
# # 3. Activations and initialisation: what twenty layers do to a signal
#
# An elementwise $y = f(x)$ has a diagonal Jacobian: $d_x = d_y \, f'(x)$. The formulas are in
# `foundation/activations.py`. One affine layer with independent inputs multiplies a variance by
#
# $$\text{fan}_{in} \operatorname{Var}(W) \;\text{ forward}, \qquad
# \text{fan}_{out} \operatorname{Var}(W) \;\text{ backward},$$
#
# and twenty layers raise that factor to the twentieth power (`foundation/initializers.py`).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from foundation.activations import ACTIVATIONS
from foundation.exercises import ask, check
from foundation.initializers import INITIALIZERS, predicted_variance
from foundation.linear import linear_backward, linear_forward

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The functions and their derivatives, by hand and by `jax.grad`

# %%
x = jnp.linspace(-4.0, 4.0, 400)
figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained", sharex=True)
for ax, (name, (forward, backward)) in zip(axes.flat, ACTIVATIONS.items(), strict=True):
    y, cache = forward(x)
    slope = backward(jnp.ones_like(x), cache)
    by_jax = jax.vmap(jax.grad(lambda v, f=forward: f(v)[0]))(x)
    assert jnp.max(jnp.abs(slope - by_jax)) < 1e-14
    ax.plot(x, y, label="f")
    ax.plot(x, slope, label="f', by hand")
    ax.plot(x[::16], by_jax[::16], "k.", ms=3, label="f', jax.grad")
    ax.set_title(name)
    ax.grid(alpha=0.25)
axes[0, 0].legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## Variance predicted and measured

# %%
shape = (400, 300)
for name, initializer in INITIALIZERS.items():
    measured = jnp.var(initializer(jax.random.key(0), shape))
    print(f"{name:<8} predicted {predicted_variance(name, shape):.6f}   measured {measured:.6f}")

# %% [markdown]
# ## Twenty layers
# Left the mean square of the signal after each layer, right that of the gradient on its way back, both by the
# hand-derived passes. Too small a start and both vanish; He's factor 2 makes up for the half that ReLU removes.

# %%
LAYERS, WIDTH = 20, 128


def through(initializer, activation):
    key = jax.random.key(1)
    forward, backward = ACTIVATIONS[activation]
    h = jax.random.normal(key, (64, WIDTH))
    signal, caches = [jnp.mean(h**2)], []
    for k in jax.random.split(key, LAYERS):
        z, linear_cache = linear_forward(h, INITIALIZERS[initializer](k, (WIDTH, WIDTH)))
        h, cache = forward(z)
        caches.append((linear_cache, cache))
        signal.append(jnp.mean(h**2))
    d_h = jax.random.normal(key, h.shape)
    gradient = [jnp.mean(d_h**2)]
    for linear_cache, cache in reversed(caches):
        d_h, _, _ = linear_backward(backward(d_h, cache), linear_cache)
        gradient.append(jnp.mean(d_h**2))
    return jnp.array(signal), jnp.array(gradient[::-1])


figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained", sharey=True)
for initializer, activation in (
    ("he", "relu"),
    ("lecun", "relu"),
    ("normal", "relu"),
    ("xavier", "tanh"),
    ("he", "gelu"),
):
    signal, gradient = through(initializer, activation)
    label = f"{initializer}, {activation}"
    left.semilogy(signal, "o-", ms=3, label=label)
    right.semilogy(gradient, "o-", ms=3, label=label)
left.set(xlabel="layer", ylabel="mean square", title="signal, forward", xticks=range(0, 21, 5))
right.set(xlabel="layer", title="gradient, backward", xticks=range(0, 21, 5))
left.legend(frameon=False, fontsize=9)
plt.show()

# %%
signal, _ = through("he", "relu")
print(f"He and ReLU keep the signal within a factor {max(signal.max() / signal[0], signal[0] / signal.min()):.1f}")
signal, _ = through("normal", "relu")
print(f"std 0.02 and ReLU leave {signal[-1]:.1e} of it")

# %% [markdown]
# ## Exercises

# %%
ask("3.1")
check("3.1", None)
ask("3.2")
check("3.2", None)

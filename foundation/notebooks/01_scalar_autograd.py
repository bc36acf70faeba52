# %% [markdown]
# # 1. Reverse-mode differentiation, one number at a time
#
# Every value in a computation remembers the values that it came from, and for each the *local* derivative. If $y$ is
# computed from $a_1, \dots, a_n$, the chain rule for the final result $L$ says
#
# $$\frac{\partial L}{\partial a_i} \mathrel{+}= \frac{\partial y}{\partial a_i}\,\frac{\partial L}{\partial y}$$
#
# with a *plus*: a value that is used twice influences $L$ in two ways. One sweep from the end to the start gives the
# derivative in every input. That sweep is all of back-propagation; the other chapters only do it with arrays.
#
# The code is `foundation/scalar_autograd.py`.

# %%
import jax
import matplotlib.pyplot as plt

from foundation.exercises import ask, check
from foundation.scalar_autograd import Value, draw, topological_order

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A neuron
# $y = \tanh(w_1 x_1 + w_2 x_2 + b)$. Each box shows value and gradient; each edge its local derivative. Multiply along
# a path from the right, add where paths meet: that is the number in the box.

# %%
x1, x2 = Value(2.0, "x1"), Value(-1.0, "x2")
w1, w2, b = Value(0.5, "w1"), Value(1.5, "w2"), Value(0.8, "b")
y = (w1 * x1 + w2 * x2 + b).tanh()
y.backward()
figure, axes = plt.subplots(figsize=(11, 5))
draw(y, axes)
plt.show()

# %% [markdown]
# ## Used twice
# In $z = a \cdot b + a$ the value $a$ has two children. Setting its gradient instead of adding to it would keep only
# one of them.

# %%
a, b = Value(3.0, "a"), Value(-2.0, "b")
z = a * b + a
z.backward()
figure, axes = plt.subplots(figsize=(7.5, 3.4))
draw(z, axes)
plt.show()

# %% [markdown]
# ## Against the framework
# The same expression in JAX, which differentiates it automatically.


# %%
def expression(a, b, exp=lambda v: v.exp(), tanh=lambda v: v.tanh()):
    return tanh(a * b + 1.0) / (exp(a) + b**2)


a, b = Value(0.7), Value(-1.3)
expression(a, b).backward()
by_jax = jax.grad(lambda a, b: expression(a, b, jax.numpy.exp, jax.numpy.tanh), argnums=(0, 1))(0.7, -1.3)
print(f"d/da: ours {a.grad:.15f}, jax {by_jax[0]:.15f}")
print(f"d/db: ours {b.grad:.15f}, jax {by_jax[1]:.15f}")
assert abs(a.grad - by_jax[0]) < 1e-14
assert abs(b.grad - by_jax[1]) < 1e-14

# %% [markdown]
# ## Why the order matters
# A value may pass its gradient on only once it has all of it. `topological_order` puts every value after its operands;
# backward takes it in reverse.

# %%
print([value.operation or f"{value.data:g}" for value in topological_order(expression(Value(0.7), Value(-1.3)))])

# %% [markdown]
# ## Exercises
# Put your answer in place of `None`. `solution("1.1")` from `foundation.exercises` shows one.

# %%
ask("1.1")
check("1.1", None)
ask("1.2")
check("1.2", None)

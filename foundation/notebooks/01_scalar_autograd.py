# %% [markdown]
# # 1. Reverse-mode differentiation, one number at a time
#
# A model with a million parameters needs a million derivatives. Computing them one by
# one would take a million runs of the model. There is a way to get all of them in one
# sweep backward, which costs at most about twice as much as the run. It was found in
# 1970, and it is the reason why neural networks can be trained. Here we build it for
# single numbers, in about seventy lines, all of which are below.
#
# ## A computation is a graph
# Take $L = \tanh(w_1 x_1 + w_2 x_2 + b)$. A computer does not see a formula. It does
# one small step after another: a product, another product, a sum, a sum, a tanh. We
# write each number as a box, and draw an arrow from each operand to its result. This is
# the **graph** of the computation. A box that an arrow leaves is a **parent** of the
# box where the arrow ends.
#
# At each step something is known at once: how the result changes if *one operand alone*
# changes a little. This is the **local derivative** of the arrow. There are only a few
# kinds:
#
# | step | local derivative with respect to $a$ |
# |---|---|
# | $a + b$ | 1 |
# | $a \cdot b$ | $b$ |
# | $a^n$ | $n a^{n-1}$ |
# | $e^a$ | $e^a$, the result itself |
# | $\ln a$ | $1/a$ |
# | $\tanh a$ | $1 - \tanh^2 a$ |
#
# Each is a plain number, because $a$ and $b$ are known when the step runs. A `Value`
# keeps three things: its number, its parents, and the local derivative for each parent.

# %%
import math

from foundation.lessons.notebook import check, jax, pictures


class Value:
    def __init__(self, data, name="", edges=(), operation=""):
        self.data, self.name, self.operation = float(data), name, operation
        self.edges = edges  # for each operand: (parent, local derivative)
        self.grad = 0.0  # filled in by the backward sweep

    def __add__(self, other):
        a, b = self, as_value(other)
        return Value(a.data + b.data, "", [(a, 1.0), (b, 1.0)], "+")

    def __mul__(self, other):
        a, b = self, as_value(other)
        return Value(a.data * b.data, "", [(a, b.data), (b, a.data)], "×")

    def __pow__(self, n):
        slope = n * self.data ** (n - 1)
        return Value(self.data**n, "", [(self, slope)], f"^{n}")

    def __truediv__(self, other):
        return self * as_value(other) ** -1

    def exp(self):
        y = math.exp(self.data)
        return Value(y, "", [(self, y)], "exp")

    def log(self):
        return Value(math.log(self.data), "", [(self, 1.0 / self.data)], "log")

    def tanh(self):
        y = math.tanh(self.data)
        return Value(y, "", [(self, 1.0 - y**2)], "tanh")


def as_value(number):
    return number if isinstance(number, Value) else Value(number)


# %% [markdown]
# ## The chain rule, along paths
# We want $\partial L / \partial a$ for every box $a$: by how much does the end change,
# if this box changes by one unit (a very small one)? Follow the change. It travels
# along the arrows, and on each arrow it is multiplied by the local derivative. If there
# are several paths to the end, it travels along all of them, and what arrives is the
# sum:
#
# $$\frac{\partial L}{\partial a} = \sum_{\text{paths from } a \text{ to } L}\;
# \prod_{\text{arrows of the path}} \text{local derivative}$$
#
# There can be very many paths. But they share arrows, and one need not walk any arrow
# twice. Let $y_1, y_2, \dots$ be the boxes that $a$ has arrows to. Every path from $a$
# begins with one of these arrows. So
#
# $$\frac{\partial L}{\partial a} = \sum_{j} \frac{\partial y_j}{\partial a}\,
# \frac{\partial L}{\partial y_j}.$$
#
# If the derivatives of all $y_j$ are known, that of $a$ is a sum of a few products. So
# begin at the end, where $\partial L / \partial L = 1$, and go *backward*. This is why
# it is called **reverse mode**, or back-propagation. The number that a box holds in the
# backward sweep, $\partial L / \partial a$, is its **gradient**. In the code each box
# hands its gradient to its parents:
#
# ```
# parent.grad += local derivative * child.grad
# ```
#
# The order in which boxes hand on is a question of its own (below).


# %%
def topological_order(result):
    order, seen, stack = [], set(), [(result, False)]
    while stack:
        value, operands_done = stack.pop()
        if operands_done:
            order.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((parent, False) for parent, _ in value.edges)
    return order


def backward(result):
    order = topological_order(result)
    for value in order:
        value.grad = 0.0
    result.grad = 1.0
    for value in reversed(order):
        for parent, local in value.edges:
            parent.grad += local * value.grad


# %% [markdown]
# ## A neuron
# Below, each box shows its value and its gradient, and each arrow its local derivative.
# Check one by hand: from the right, multiply along the path to $w_2$. The tanh has the
# local derivative $1 - y^2$, the sums have 1, and the product has $x_2 = -1$.

# %%
x1, x2 = Value(2.0, "x1"), Value(-1.0, "x2")
w1, w2, b = Value(0.5, "w1"), Value(1.5, "w2"), Value(0.8, "b")
y = (w1 * x1 + w2 * x2 + b).tanh()
backward(y)
pictures.graph(topological_order(y))
assert w2.grad == (1 - y.data**2) * x2.data

# %% [markdown]
# ## Used twice
# In $z = a \cdot b + a$ the box $a$ has two arrows, one into the product and one into
# the sum. There are two paths, so there are two contributions: $b$ through the product,
# and 1 directly. With $b = -2$ they add up to $-1$.
#
# The `+=` in `backward` is all that this takes. With `=` the second contribution would
# replace the first, and the model would learn something, but not what it should. Every
# later chapter has a value that is used twice: a bias in every row of a batch, a table
# at every position, a stream in a block and around it. Each time the gradients add.

# %%
a, b = Value(3.0, "a"), Value(-2.0, "b")
z = a * b + a
backward(z)
pictures.graph(topological_order(z), 7.5, 3.4)
assert a.grad == b.data + 1.0

# %% [markdown]
# ## Why the order matters
# A box may pass its gradient on only when it has *received all of it*. If $a$ passed on
# what came from the sum, before the product's part arrived, the rest would be lost. So
# `backward` needs every box after all boxes that it has arrows to. In reverse this is
# called a **topological order**, operands before results:


# %%
def expression(a, b, of):
    return of.tanh(a * b + 1.0) / (of.exp(a) + b**2) + of.log(b**2)


order = topological_order(expression(Value(0.7), Value(-1.3), Value))
print([value.operation or f"{value.data:g}" for value in order])

# %% [markdown]
# ## Against the framework, and against a small step
# The same expression in JAX, which does what we did with arrays in the boxes, and by
# the two-point difference of chapter 0:

# %%
a, b = Value(0.7), Value(-1.3)
backward(expression(a, b, Value))


def in_jax(a, b):
    return expression(a, b, jax.numpy)


by_jax = jax.grad(in_jax, argnums=(0, 1))(0.7, -1.3)
h = 1e-5
step = (in_jax(0.7 + h, -1.3) - in_jax(0.7 - h, -1.3)) / (2 * h)
print(f"d/da: ours {a.grad:.15f}, jax {by_jax[0]:.15f}, by a step {step:.9f}")
print(f"d/db: ours {b.grad:.15f}, jax {by_jax[1]:.15f}")
assert abs(a.grad - by_jax[0]) < 1e-14
assert abs(b.grad - by_jax[1]) < 1e-14

# %% [markdown]
# ## What it costs
# A product $z = ab$ is one multiplication forward. Backward it is two, one for each of
# its inputs: $b \cdot d_z$ and $a \cdot d_z$. So all derivatives together cost about
# twice as much as the forward pass, whether there are two inputs or a million. This is
# true for *one* output. With many there would be a sweep for each, and it might be
# cheaper to go forward, from each input. A loss is one number, and a model has many
# parameters: reverse mode is the right way round.
#
# The price: the local derivatives need the numbers of the forward pass, so these have
# to be kept until the sweep comes by. For a large model that is most of the memory. In
# the next chapters each operation says what it keeps: its **cache**.
#
# ## From numbers to arrays
# A product of two 1,000 x 1,000 matrices has a billion products in it, hopeless as
# single boxes. But its backward pass is a known formula, two matrix products. So from
# here on a box holds a whole array, a step is a whole operation, and the local
# derivative is the vector-Jacobian product of chapter 0. Nothing else changes.
#
# ## Exercises

# %%
check("1.1", None)

# %%
check("1.2", None)

# %%
check("1.3", None)

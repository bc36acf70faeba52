# %% [markdown]
# # 0. Shapes, gradients, and how to check one
#
# The other chapters derive the gradient of everything that is inside a language model.
# They all use four ideas, which this chapter explains with small numbers: shapes, the
# vector-Jacobian product, the adjoint, and the check. You need to know what a
# derivative is, and a little Python.
#
# ## Shapes and letters
# An **array** is a box of numbers. Its **shape** says how many there are along each
# axis: [4, 3] has 4 rows of 3 numbers. A letter for an axis means the same everywhere:
#
# | letter | what it counts | | letter | what it counts |
# |---|---|---|---|---|
# | B | sequences in a batch | | V | entries of the vocabulary |
# | T | positions (tokens) of a sequence | | E | experts |
# | D | width of the model | | K | experts that a token goes to |
# | H, A | heads, and the width of one | | F | hidden width of an expert |
#
# Shapes are the cheapest check that there is. Most wrong formulas for a gradient do not
# even have the right shape, because **a gradient has the shape of the thing that it is
# the gradient of**: one number for each number of `W`.

# %%
from foundation.lessons.notebook import agree, check, jax, jnp, pictures

x = jnp.array([1.0, 2.0, -1.0])  # [3]
W = jnp.array([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]])  # [3, 2]
y = x @ W  # [2]
print("x", x.shape, " W", W.shape, " y", y.shape)

# %% [markdown]
# ## One derivative for each pair: the Jacobian
# A function of several numbers that gives several numbers has a derivative for each
# pair of an output and an input: by how much does $y_o$ change, if $x_i$ changes a
# little? Written as a table, these are the **Jacobian**, $J_{oi} = \partial y_o /
# \partial x_i$. A row belongs to an output, a column to an input.
#
# For $y = xW$, entry by entry, $y_o = \sum_i x_i W_{io}$. So $\partial y_o / \partial
# x_i = W_{io}$, and $J = W^\top$. `jax.jacobian` agrees.

# %%
J = jax.jacobian(lambda x: x @ W)(x)
print(J)
assert (J == W.T).all()

# %% [markdown]
# Nobody computes the Jacobians of a real model. With respect to `W` this one has 2 x 6
# entries. For a layer with 1,000 inputs, 1,000 outputs and a batch of 1,000 it would
# have $10^6 \times 10^6$ entries, and nearly all of them are 0.
#
# ## What we need instead: the vector-Jacobian product
# A model ends in *one* number, the **loss** $L$: how wrong it is. We want $\partial L /
# \partial x$ for every $x$ in the model. Suppose that we know already how the loss
# depends on $y$. We call these numbers $d_y$:
#
# $$d_y = \frac{\partial L}{\partial y}, \quad\text{one number for each entry of } y.$$
#
# In other books $d_y$ is called the **cotangent** of $y$, or the upstream gradient. We
# use the word cotangent for any array that stands in the place of $d_y$, also a made-up
# one. The chain rule says how a change of $x_i$ reaches the loss: through every output.
# It adds up what it does through each.
#
# $$\frac{\partial L}{\partial x_i} = \sum_o \frac{\partial L}{\partial y_o}
# \frac{\partial y_o}{\partial x_i} = \sum_o (d_y)_o\, J_{oi}
# \qquad\text{so}\qquad d_x = J^\top d_y$$
#
# This is the **vector-Jacobian product**. A **backward pass** of an operation is a
# function that takes $d_y$ and gives $d_x$, *without* making $J$. For our example it is
# one line, $d_x = W d_y$. All of back-propagation is this: begin with $d_L = 1$, and
# call the backward passes of the operations from the last to the first. Each turns the
# cotangent of its output into the cotangent of its input.

# %%
d_y = jnp.array([0.3, -2.0])
print(J.T @ d_y, "through the Jacobian;", W @ d_y, "by the backward pass")

# %% [markdown]
# ## What an adjoint is
# For a *linear* map, one of the form $y = Mx$, the backward pass does not depend on
# $x$. It is the map $d_y \mapsto M^\top d_y$. That map is called the **adjoint** of
# $M$. It can be recognised without matrices: it is the one map $M^*$ with
#
# $$\langle d_y, M x\rangle = \langle M^* d_y, x\rangle \quad\text{for every } x
# \text{ and } d_y,$$
#
# where $\langle a, b\rangle$ is the sum of all products of entries. Many steps of a
# model are linear, and their adjoints are worth knowing by heart:
#
# | step | its adjoint |
# |---|---|
# | copy a number to n places | add up the n places |
# | add up n numbers | copy the cotangent to all n |
# | read row 7 of a table | add into row 7 |
# | a permutation (reshape, transpose, split) | the inverse permutation |
# | multiply by a matrix | multiply by its transpose |
# | a rotation | the rotation back |
#
# The first line is the reason why gradients *add* where a value is used twice. Take the
# running difference $y_i = x_{i+1} - x_i$. Every inner $x_i$ is used twice: with a plus
# in $y_{i-1}$, and with a minus in $y_i$. So $(d_x)_i = (d_y)_{i-1} - (d_y)_i$. The
# defining equation is a check that needs no calculus:


# %%
def difference(x):
    return x[1:] - x[:-1]


def difference_adjoint(d_y):
    zero = jnp.zeros(1)
    return jnp.concatenate([zero, d_y]) - jnp.concatenate([d_y, zero])


x5, d_y4 = jax.random.normal(jax.random.key(0), (5,)), jnp.arange(4.0)
print("<d_y, M x>  =", jnp.vdot(d_y4, difference(x5)))
print("<M* d_y, x> =", jnp.vdot(difference_adjoint(d_y4), x5))

# %% [markdown]
# ## How to check a gradient
# A derivation on paper is wrong more often than one thinks, and a model with a wrong
# gradient often still learns, only worse. So each gradient here is computed three ways.
#
# 1. **By hand**: the backward pass.
# 2. **By autodiff**: `jax.grad` differentiates the forward pass. It agrees to 15
#    digits, or something is wrong.
# 3. **By finite differences**: move one input by a small $h$, and look at what the
#    output does: $f'(x) \approx (f(x + h) - f(x - h)) / 2h$. This needs no theory at
#    all, so it judges both of the others. But it has an error of its own.
#
# All need a scalar, and an operation gives an array. So we take a random cotangent
# $d_y$ and look at the scalar $f(x) = \langle d_y, y(x)\rangle$. Its gradient is
# exactly what the backward pass gives for $d_y$. Random, because a special cotangent
# hides bugs: with all ones the gradient of a softmax is 0, right or wrong, because its
# outputs always add up to 1.

# %%
x = jax.random.normal(jax.random.key(1), (6,))
p, random = jax.nn.softmax(x), jax.random.normal(jax.random.key(2), (6,))
for name, d_y in (("ones", jnp.ones(6)), ("random", random)):
    d_x = p * (d_y - jnp.sum(p * d_y))  # zeros, if someone forgot to write it
    print(f"{name:>7}: largest entry of d_x {jnp.max(jnp.abs(d_x)):.2e}")

# %% [markdown]
# ## How small is a small step?
# Two errors pull in opposite directions. **Truncation**: the curve is not a line, and
# the two-point formula is off by about $h^2 f'''/6$. **Rounding**: $f$ is known to 16
# digits, so the difference of two values is off by about $10^{-16} |f|$, and is then
# divided by $h$. Large $h$ suffers from the first, small $h$ from the second. With four
# points,
#
# $$f'(x) \approx \frac{8\,(f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))}{12 h},$$
#
# the term with $h^2$ cancels, and what is left falls like $h^4$. Both forms can be
# used. The picture shows why the table of this project uses four points: its valley is
# wider and deeper, so that one $h = 10^{-4}$ serves every operation.


# %%
def f(x):
    return jnp.exp(jnp.sin(3.0 * x))


def two_points(h, x=0.7):
    return (f(x + h) - f(x - h)) / (2 * h)


def four_points(h, x=0.7):
    far, near = f(x + 2 * h) - f(x - 2 * h), f(x + h) - f(x - h)
    return (8 * near - far) / (12 * h)


steps = 10.0 ** jnp.linspace(-10, -1, 55)
exact = 3.0 * jnp.cos(2.1) * f(0.7)
forms = {"two points": two_points, "four points": four_points}
errors = {n: (steps, jnp.abs(form(steps) / exact - 1)) for n, form in forms.items()}
title = "error of a finite difference"
pictures.curves({title: errors}, "step h", "relative error", log=True, log_x=10)

# %% [markdown]
# ## The whole check, in ten lines
# Errors are measured relative to the *largest* entry: an entry whose true value is 0 is
# rounding noise in all three ways, and dividing by it would mean nothing. This is what
# `uv run python -m foundation` does for every operation, at inputs where things
# could go wrong. Here it is for the product $y = xW$, with a mistake that you may know:
# someone divides by the number of rows, "because the loss is a mean".

# %%
x, W = (jax.random.normal(jax.random.key(i), s) for i, s in ((3, (4, 3)), (4, (3, 5))))
d_y = jax.random.normal(jax.random.key(5), (4, 5))
by_autodiff = jax.grad(lambda W: jnp.vdot(d_y, x @ W))(W)
agree("as derived", x.T @ d_y, by_autodiff, within=1e-14)
agree("divided", x.T @ d_y / 4, by_autodiff, within=1.0)

# %% [markdown]
# ## Exercises
# Put your answer in place of `None`: a number, or a function. The second wrong answer
# gets the formula as a hint; `solution("0.1")` from `foundation.exercises` shows a
# right one. A longer task waits in the terminal: `uv run python -m foundation derive
# linear`.

# %%
check("0.1", None)

# %%
check("0.2", None)

# %%
check("0.3", None)

# %%
check("0.4", None)

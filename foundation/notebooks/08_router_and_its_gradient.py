# %% [markdown]
# # 8. The router and its gradient
#
# In a **mixture of experts** the network of a block is replaced by E small networks,
# the **experts**. A **router** sends each token to K of them; the others do nothing for
# it. So the model has many parameters and uses few of them for a token. But the router
# *chooses*, and a choice has no derivative. What does it learn from, then? From three
# things: the gates, a balance loss, and a third loss that keeps it calm. The code is
# `foundation/router.py`, `foundation/experts.py`, `foundation/moe.py`, and for the last
# two steps `foundation/balancing.py`.
#
# ## Forward
# For one token with stream $x$, [D], and a router matrix $W$, [D, E]:
#
# $$z = xW, \qquad p = \operatorname{softmax}(z), \qquad
# S = \text{the K largest of } z$$
#
# $z$ are the logits, $p$ the probabilities, and $S$ the **chosen** experts. The layer's
# answer is the sum of the chosen experts' answers, each times its **gate**:
#
# $$y = \sum_{e \in S} g_e\, h_e, \qquad g_e = \frac{p_e}{\sum_{j \in S} p_j}
# \;\;(K > 1), \qquad g_e = p_e \;\;(K = 1).$$
#
# For K > 1 the gates are made to add up to 1. For K = 1 that would make the gate the
# constant 1, and the router would get no gradient at all; so there the gate is $p_e$.
#
# ## Step 1: through the combination
# $y$ is a sum of products. Each factor gets the cotangent times the other:
#
# $$d_{g_e} = \langle d_y, h_e\rangle, \qquad d_{h_e} = g_e\, d_y$$
#
# The first is the heart of the matter. The gate of expert $e$ should grow if the
# expert's answer $h_e$ points *against* the gradient $d_y$, where the loss falls.
#
# ## Step 2: the choice
# $S$ is piecewise constant: a small change of $z$ leaves it as it is. So its derivative
# is 0 wherever it exists, and we treat $S$ as given. (At a tie, where two logits are
# equal, it does not exist.)
#
# ## Step 3: through the gates, K > 1
# Write the gates with the exponentials of the softmax. The sum $\sum_j e^{z_j}$ over
# *all* experts cancels:
#
# $$g_e = \frac{p_e}{\sum_{j\in S} p_j} = \frac{e^{z_e}}{\sum_{j \in S} e^{z_j}}
# = \operatorname{softmax}(z_S)_e$$
#
# The gates are a softmax over the chosen logits alone. Chapter 4 has its rule:
#
# $$\boxed{\;d_{z_e} = g_e\,\Bigl(d_{g_e} - \sum_{j\in S} g_j\, d_{g_j}\Bigr)
# \text{ for } e \in S, \qquad d_{z_e} = 0 \text{ for } e \notin S\;}$$
#
# An expert that was not chosen gets nothing: not in its weights, and not in its router
# column. The entries of the chosen add up to 0, so the router learns only "a little
# more of this one and less of that one".
#
# ## Step 4: through the gate, K = 1
# Here $g = p_s$ with $S = \{s\}$, an entry of the whole softmax. Row $s$ of its
# Jacobian is $p_s([s = e] - p_e)$, with the bracket of chapter 4 (1 if $s = e$, else
# 0). So
#
# $$\boxed{\;d_{z_e} = d_g\, p_s\,([s = e] - p_e) \text{ for every } e\;}$$
#
# Now the others do get a gradient, because they are in the denominator of $p_s$.
#
# ## Step 5: to the weights
# $z = xW$ is chapter 2: $d_W = x^\top d_z$ and $d_x = d_z W^\top$. Since $x$ also went
# into the experts, its whole gradient is a sum of both.
#
# Below, three tokens and six experts. The token $t$ reads row $t$ of $W$, so the
# gradient of $W$ *is* the gradient of the logits. Bold entries are the chosen experts.

# %%
from foundation import balancing, moe
from foundation.lessons.notebook import agree, check, jax, jnp, pictures, shown
from foundation.router import choice_share, router_backward, router_forward

# %%
E, T = 6, 3
x = jnp.eye(T)[None]
W = jax.random.normal(jax.random.key(3), (T, E))
zero = jnp.zeros(())
gradients, chosen = {}, {}
for K in (2, 1):
    routing, cache = router_forward(x, W, K)
    d_g = jax.random.normal(jax.random.key(4), routing.gates.shape)
    _, d_z = router_backward(d_g, zero, zero, cache)

    def scalar(W, K=K, d_g=d_g):
        return jnp.vdot(d_g, router_forward(x, W, K)[0].gates)

    assert jnp.max(jnp.abs(d_z - jax.grad(scalar)(W))) < 1e-14
    title = f"top {K}: gradient of the logits"
    gradients[title] = d_z
    chosen[title] = (routing.experts[0, :, :, None] == jnp.arange(E)).any(1)
pictures.heatmaps(gradients, "expert", "token", bold=chosen, numbers=".3f", height=2.9)

# %% [markdown]
# ## Dropped choices
# To run fast, each expert has a fixed number of **slots** for a sequence, its capacity
# $C$. Slots are given token by token. A choice that finds its expert full is
# **dropped**: it adds nothing to $y$. Then $h$ is 0 for it, so step 1 gives $d_g =
# \langle d_y, 0 \rangle = 0$, exactly. The token lives on in the residual stream alone.
#
# In the code `slot` is the slot of each choice, and one more slot, the last, is
# "nowhere": dropped choices go there, and it is thrown away.

# %%
shown(moe.dispatch_forward, moe.combine_forward, moe.combine_backward)

# %% [markdown]
# Four tokens want expert 0, which has two slots:

# %%
tokens = jnp.ones((1, 4, 2))
slot, keep = moe.assign_slots(jnp.zeros((1, 4, 1), int), experts_total=2, places=2)
print("kept:     ", keep[0, :, 0].tolist())
params = {
    "router": jnp.array([[4.0, 0.0], [0.0, 0.0]]),
    "w_in": jax.random.normal(jax.random.key(0), (2, 2, 3)),
    "w_out": jax.random.normal(jax.random.key(1), (2, 3, 2)),
}
output, cache = moe.moe_forward(tokens, params, top_k=1, capacity_factor=1.0)
d_y = jax.random.normal(jax.random.key(2), tokens.shape)
d_x, _ = moe.moe_backward(d_y, zero, zero, cache)
print("outputs:  ", *(f"{v:7.3f}" for v in output.y[0, :, 0]))
print("gradients:", *(f"{v:7.3f}" for v in d_x[0, :, 0]))
print(f"{100 * output.dropped:.0f} % dropped")
assert (d_x[0, 2:] == 0.0).all()

# %% [markdown]
# ## Step 6: the balance loss
# With K > 1 an expert that is never chosen gets no gradient from the task (step 3). The
# others improve, it does not. So a few experts may end with all tokens. The **balance
# loss** pulls against this. For one sequence of T tokens,
#
# $$L_b = E \sum_e f_e P_e, \qquad f_e = \text{share of the choices that went to } e,
# \qquad P_e = \frac1T \sum_t p_{te}.$$
#
# It is 1 at perfect balance, where all $f_e = P_e = 1/E$. If P puts the experts in the
# same order as f, it is at least 1. But 1 is not its minimum. Take four tokens, two
# experts and K = 1. Three tokens have p = (0.51, 0.49), and one has (0.05, 0.95). Then
# f = (0.75, 0.25), but P = (0.395, 0.605) has the other order. So $L_b = 2\,(0.75 \cdot
# 0.395 + 0.25 \cdot 0.605) = 0.895$. Now its gradient:
#
# 1. $f$ counts choices. It is piecewise constant, so it has no derivative.
# 2. $P_e$ contains $p_{te}$ with the factor $1/T$. So $\partial L_b / \partial p_{te} =
#    E f_e / T$: *in the probabilities*, the push away from an expert is proportional to
#    how popular it is, and the same for every token.
# 3. The logits get it through the softmax, $d_z = p \odot (d_p - \langle p,
#    d_p\rangle)$:
#
# $$\boxed{\;\frac{\partial L_b}{\partial z_{te}} = \frac{E}{T}\; p_{te}\,
# \Bigl(f_e - \sum_j p_{tj} f_j\Bigr)\;}$$
#
# *In the logits* there is a factor $p_{te}$. A popular expert to which this token gives
# no probability is hardly pushed. And the reference is not the fair share 1/E, but the
# average popularity under the token's own probabilities.
#
# ## Step 7: the z-loss
# The third loss keeps logits small, where float numbers are fine-grained: $L_z =
# \frac1T \sum_t \ell_t^2$ with $\ell_t = \operatorname{logsumexp}(z_t)$. Chain rule,
# and chapter 4 for the inner derivative $p$:
#
# $$\boxed{\;\frac{\partial L_z}{\partial z_{te}} = \frac{2\,\ell_t}{T}\; p_{te}\;}$$
#
# Gates, balance and z-loss all end in the same logits. They are three uses of $z$, so
# their gradients add. With this, `router_backward` is complete. In the code $z$ is
# `logits`, $f$ is `share`, $\ell$ is `log_total`, and each mean is over the B sequences
# too.

# %%
shown(router_forward, router_backward)

# %% [markdown]
# The boxed formulas:

# %%
x = jax.random.normal(jax.random.key(5), (1, 8, 4))
W = jax.random.normal(jax.random.key(6), (4, E))
routing, _ = router_forward(x, W, 2)
z = (x @ W)[0]
p, f = jax.nn.softmax(z), choice_share(routing.experts, E, z.dtype)[0]
balance = E / 8 * p * (f - (p @ f)[:, None])
calm = 2 * jax.nn.logsumexp(z, axis=-1)[:, None] / 8 * p
for name, formula in {"balance": balance, "z": calm}.items():
    by_jax = jax.grad(lambda W, n=name: getattr(router_forward(x, W, 2)[0], n))(W)
    agree(f"{name} loss, by hand and by jax.grad", x[0].T @ formula, by_jax, 1e-14)

# %% [markdown]
# ## Step 8: a bias, and no loss
# A balance loss pulls the router away from its task. Newer models use a **bias**
# instead: a number $b_e$ for each expert, which takes part in the choice and in nothing
# else. The K experts with the largest $s_e + b_e$ are chosen, where $s_e$ is the score
# (so far $p_e$), and the gates are made from $s_e$ alone. After each step of training,
#
# $$b_e \leftarrow b_e + \text{rate} \cdot \operatorname{sign}(\bar f - f_e),$$
#
# with $\bar f = 1/E$. Nothing is differentiated here. It is a **controller**, like a
# thermostat. Each step has the size of the rate, however near the goal is, so the loads
# swing around their fair share. If the bias were in the gate too, it would scale the
# layer's output, and the model would have to learn to undo that.
#
# ## Step 9: scores by sigmoid, as in DeepSeek-V3
# With hundreds of experts, one softmax makes each expert compete with all others.
# DeepSeek-V3 (256 experts, K = 8) takes the score of each by itself, $s_e = \sigma(z_e)
# = 1 / (1 + e^{-z_e})$, chooses with a bias, and divides the chosen scores by their sum
# $\Sigma = \sum_{j \in S} s_j$: $g_e = c\, s_e / \Sigma$, with a constant c of 2.5. Now
# backward:
#
# 1. The quotient: $\partial g_e / \partial s_j = \frac{c}{\Sigma}\bigl([e = j] -
#    \frac{s_e}{\Sigma}\bigr)$. So $d_{s_j} = \frac{c}{\Sigma}\bigl(d_{g_j} - \bar
#    d\bigr)$, with the mean $\bar d = \sum_{e \in S} \frac{s_e}{\Sigma}\, d_{g_e}$.
# 2. The sigmoid (chapter 3): $d_{z_j} = d_{s_j}\, s_j (1 - s_j)$.
#
# $$\boxed{\;d_{z_e} = g_e\,(1 - s_e)\,\bigl(d_{g_e} - \bar d\bigr)
# \text{ for } e \in S, \qquad 0 \text{ for } e \notin S\;}$$
#
# It is step 3 with one more factor, $1 - s_e$. An expert whose score is near 1 is
# *settled*: its logit hardly moves any more. And the entries no longer add up to 0, so
# the router can raise all the chosen logits together. With K = 1 the gate is the
# constant c, and the router gets nothing. (Its paper: arXiv 2412.19437, equations 12 to
# 16. There the rate is 0.001, and a balance loss with the tiny weight 0.0001 remains,
# with $s_e / \sum_j s_j$ in the place of $p_e$.)

# %%
shown(balancing.sigmoid_router_forward, balancing.sigmoid_router_backward)

# %%
z, bias = jax.random.normal(jax.random.key(7), (2, 5, E))
gates, cache = balancing.sigmoid_router_forward(z, bias[0], 3, 2.5)
d_g = jax.random.normal(jax.random.key(8), gates.shape)
d_z = balancing.sigmoid_router_backward(d_g, cache)
_, back = jax.vjp(lambda z: balancing.sigmoid_router_forward(z, bias[0], 3, 2.5)[0], z)
(by_jax,) = back(d_g)
agree("sigmoid router, by hand and by jax.grad", d_z, by_jax, 1e-14)
print("sums of the rows:", *(f"{total:.3f}" for total in d_z.sum(axis=1)))

# %% [markdown]
# ## Side by side
# A router that starts with a lean, and no task. First gradient descent on the balance
# loss. Then its matrix stays as it is, and a bias does the work, on sigmoid scores,
# with three rates. The curve is the load of the busiest expert, in fair shares.

# %%
E, T, D, STEPS = 8, 64, 16, 400
x = jax.random.normal(jax.random.key(5), (1, T, D)).at[..., 0].set(1.0)
lean = jnp.linspace(2.0, -2.0, E)
W = 0.3 * jax.random.normal(jax.random.key(6), (D, E)).at[0].set(lean / 0.3)
scores = jax.nn.sigmoid(x[0] @ W)


@jax.jit
def descend(W):
    routing, cache = router_forward(x, W, 2)
    no_task = jnp.zeros_like(routing.gates)
    _, d_W = router_backward(no_task, jnp.ones(()), zero, cache)
    return W - 2.0 * d_W, jnp.max(choice_share(routing.experts, E, W.dtype))


@jax.jit
def adjust(bias, rate):
    f = balancing.choice_fraction(balancing.biased_choice(scores, bias, 2)[0])
    return balancing.bias_step(bias, f, rate), jnp.max(f)


loads = {"balance loss": []}
for _ in range(STEPS):
    W, busiest = descend(W)
    loads["balance loss"].append(float(E * busiest))
for rate in (0.01, 0.003, 0.001):
    bias, loads[f"bias, rate {rate}"] = jnp.zeros(E), []
    for _ in range(STEPS):
        bias, busiest = adjust(bias, rate)
        loads[f"bias, rate {rate}"].append(float(E * busiest))
pictures.curves({"the busiest expert": loads}, "step", "load / fair share", level=1.0)
for name, load in loads.items():
    print(f"{name:<16} {load[0]:.2f} -> {load[-1]:.2f}")
assert max(loads["bias, rate 0.001"][-1], loads["balance loss"][-1]) < 1.2

# %% [markdown]
# The larger the rate, the sooner the loads are near their fair share, and the wider
# they swing around it. A third way lets each *expert* choose its tokens: all loads are
# equal, and chapter 12 shows why such a layer cannot write.
#
# | way | has a gradient | sees the choices |
# |---|---|---|
# | balance loss | yes, through $P$ | yes, through $f$ |
# | bias | no | yes |
# | expert choice | no | it makes them |
#
# A test of gradients can say nothing about the last two; the table holds them against
# counting. The project has the first two, in
# `moe_jax/model/moe/router.py`.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive router` asks for steps 3 to 7 in
# one function, and `derive sigmoid_router` for step 9. Then `derive dispatch` and
# `derive combine`; the docstring of `foundation/moe.py` derives these two.

# %%
check("8.1", None)

# %%
check("8.2", None)

# %%
check("8.3", None)

# %%
check("8.4", None)

# %%
check("8.5", None)

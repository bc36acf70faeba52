# %% [markdown]
# # 16. Balancing four ways
#
# Left alone, a router ends up with a few busy experts and many idle ones. Chapter 8 has
# shown why: an expert that is not chosen gets no gradient. There are four common cures.
# They look alike in a configuration file, and they work in quite different ways.
# **Which of them has a gradient, and which of them sees what was really chosen?** These
# are two different questions, and only one of the four says yes to both.
#
# The code is `foundation/balancing.py`. The project has the second and the third way,
# in `moe_jax/model/moe/balance.py` and `moe_jax/model/moe/router.py`. The fourth is
# there under a name that says that it leaks.
#
# ## What is measured
# For T tokens of one text, $p_{te}$ is the router's probability of expert $e$ for token
# $t$. Each token chooses the K experts with the highest probability. Two sums describe
# the load of an expert:
#
# $$f_e = \frac{\text{choices of } e}{T K}, \qquad P_e = \frac1T \sum_t p_{te}.$$
#
# $f$ is what *happens*. It counts, so it has no derivative. $P$ is what the router
# *says*. It is smooth. All four cures are about these two.
#
# ## Step 1: importance
# The oldest cure is a loss on what the router says. Let $I_e = \sum_t p_{te} = T P_e$
# be the **importance** of an expert. Punish its **coefficient of variation**, the
# standard deviation divided by the mean, squared. With $S = \sum_e I_e$ and $Q = \sum_e
# I_e^2$, the variance is $Q/E - S^2/E^2$ and the squared mean is $S^2/E^2$. So
#
# $$L = \frac{E\,Q}{S^2} - 1, \qquad
# \boxed{\;\frac{\partial L}{\partial I_e} = 2E\Bigl(\frac{I_e}{S^2} -
# \frac{Q}{S^3}\Bigr)\;}$$
#
# Every token's $p_{te}$ gets the gradient of $I_e$. The second term comes from the
# denominator: forgetting it is a planted bug.
#
# The weakness is that $L$ never looks at a choice. Let every token have the
# probabilities 0.26, 0.25, 0.25, 0.24. The importance is nearly even, so the loss is
# nearly 0. And *every* token goes to expert 0.
#
# ## Step 2: balance
# The cure of chapter 8 is $L = E \sum_e f_e P_e$. The gradient goes through $P$, and
# $f$ says where to push: $\partial L/\partial p_{te} = E f_e / T$. In the example above
# $f_0 = 1$ for K = 1, so the whole push is against expert 0. It sees the choices *and*
# has a gradient.
#
# A detail about its scale. $f$ is divided by $TK$, so it adds up to 1, and at perfect
# balance $L = E \cdot E \cdot \frac1E \cdot \frac1E = 1$, for every K. A well-known
# program counted choices per token, so its $f$ added up to K, and its loss was K times
# as strong. Nothing failed. The same coefficient just meant something else.

# %%
from foundation import balancing
from foundation.caching import kept_choices
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown
from foundation.linear import linear_backward, linear_forward
from foundation.softmax import softmax_backward, softmax_forward

shown(balancing.importance_loss_forward, balancing.importance_loss_backward)

# %%
leaning = jnp.tile(jnp.array([0.26, 0.25, 0.25, 0.24]), (20, 1))
importance, _ = balancing.importance_loss_forward(leaning)
print(f"all 20 tokens choose expert 0: importance loss {importance:.4f}, at best 0")
balance = balancing.balance_loss_of(leaning, 1)
print(f"                               balance loss {balance:.4f}")
even = jnp.asarray(np.array([np.roll([0.4, 0.3, 0.2, 0.1], n) for n in range(4)]))
print(
    "even, K = 1, 2, 4: ",
    *(f"{balancing.balance_loss_of(even, k):.4f}" for k in (1, 2, 4)),
)
assert importance < 1e-3 < balance - 1

# %% [markdown]
# ## Step 3: a bias
# A loss pulls the router away from its task, and its gradient mixes with the one that
# matters. The third cure has no loss. Each expert has a number $b_e$, the **bias**. The
# choice is made by $p_e + b_e$. The gate is $p_e$ of what was chosen, *without* the
# bias. After each step of training,
#
# $$b_e \leftarrow b_e + \text{rate} \cdot \operatorname{sign}(\bar f - f_e),$$
#
# with $\bar f = 1/E$: an expert below its fair share gets a little more. It sees the
# choices, and *it has no gradient*. Nothing is differentiated. It is a **controller**,
# like a thermostat.
#
# Two things follow. The bias must stay out of the gate. If it were in, the output of
# the layer would be scaled by it, and the model would have to learn to undo that. And
# the step has the size of the rate, however near the goal is. So loads do not settle.
# They swing around their fair share, in steps of the rate.
#
# ## Step 4: let the experts choose
# The fourth cure turns the question round. Each *expert* takes the $C$ tokens that like
# it most. All experts have the same load, exactly, at every step. No loss, no bias, no
# gradient is needed. The price is in chapter 12: whether a token is taken depends on
# later tokens, so such a layer cannot be used to write.
#
# ## Side by side
# One router with a strong lean, no task, and the four cures. The curve is the load of
# the busiest expert, in units of its fair share. A loss acts on the router's matrix, by
# the hand-derived gradients; the bias leaves the matrix alone. It is drawn with three
# rates. A step of the largest one moves many tokens at once, so the load ends by
# swinging between 1.4 and 1.9 times the fair share. The smallest one ends at 1.06, as
# near as the balance loss, after three times as many steps as the middle one.

# %%
E, T, D, K, STEPS = 8, 64, 16, 2, 400
x = jax.random.normal(jax.random.key(5), (T, D)).at[:, 0].set(1.0)
lean = jnp.linspace(2.0, -2.0, E)
start = 0.3 * jax.random.normal(jax.random.key(6), (D, E)).at[0].set(lean / 0.3)


@jax.jit
def look(W):
    """Probabilities of the router, the choices without a bias, and the way back."""
    logits, _ = linear_forward(x, W)
    p, _ = softmax_forward(logits)
    chosen, _ = balancing.biased_choice(p, jnp.zeros(E), K)
    return p, balancing.choice_fraction(chosen)


def back_to_matrix(d_p, W):
    """The gradient of the router's matrix from that of the probabilities."""
    logits, linear_cache = linear_forward(x, W)
    _, softmax_cache = softmax_forward(logits)
    return linear_backward(softmax_backward(d_p, softmax_cache), linear_cache)[1]


@jax.jit
def by_importance(W):
    p, _ = look(W)
    _, cache = balancing.importance_loss_forward(p)
    return W - 2.0 * back_to_matrix(
        balancing.importance_loss_backward(jnp.ones(()), cache), W
    )


@jax.jit
def by_balance(W):
    _, f = look(W)
    return W - 2.0 * back_to_matrix(jnp.broadcast_to(E * f / T, (T, E)), W)


@jax.jit
def by_bias(bias, rate):
    f = balancing.choice_fraction(balancing.biased_choice(look(start)[0], bias, K)[0])
    return balancing.bias_step(bias, f, rate), f


loads = {"importance": [], "balance loss": []}
for name, step in {"importance": by_importance, "balance loss": by_balance}.items():
    W = start
    for _ in range(STEPS):
        loads[name].append(float(jnp.max(look(W)[1]) * E))
        W = step(W)
for rate in (0.01, 0.003, 0.001):
    bias, loads[f"bias, rate {rate}"] = jnp.zeros(E), []
    for _ in range(STEPS):
        bias, f = by_bias(bias, rate)
        loads[f"bias, rate {rate}"].append(float(jnp.max(f) * E))
taken = kept_choices(look(start)[0], K, 1.0, "expert")
loads["expert choice"] = [float(jnp.max(balancing.choice_fraction(taken)) * E)] * STEPS
pictures.curves(
    {"the busiest expert": loads},
    xlabel="step",
    ylabel="load / fair share",
    level=1.0,
)
for name, load in loads.items():
    print(f"{name:<16} {load[0]:.2f} -> {load[-1]:.2f}")
assert loads["expert choice"][-1] == 1.0
assert max(loads["bias, rate 0.001"][-1], loads["balance loss"][-1]) < 1.1

# %% [markdown]
# ## The answer
#
# | way | has a gradient | sees the choices |
# |---|---|---|
# | importance | yes, through $I$ | no |
# | balance loss | yes, through $P$ | yes, through $f$ |
# | bias | no | yes |
# | expert choice | no | it makes them |
#
# So a test of gradients can say nothing about two of the four. The table of `uv run
# python -m foundation 16` holds the importance loss against autodiff and differences.
# The others are held against counting: each token sorted by itself, each counter
# compared with its fair share.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive importance_loss`.

# %%
check("16.1", None)

# %%
check("16.2", None)

# %%
check("16.3", None)

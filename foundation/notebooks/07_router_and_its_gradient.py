# %% [markdown]
# # 7. The router and its gradient
#
# For one token: $z = xW$, $p = \operatorname{softmax}(z)$, $S$ = the $K$ largest logits, and gates
#
# $$g = \frac{p_S}{\sum p_S} = \operatorname{softmax}(z_S) \qquad (K > 1), \qquad\qquad g = p_s \qquad (K = 1).$$
#
# The choice $S$ is piecewise constant: it has no gradient. What does the router learn from, then? From the gates, and
# only through the logits in $S$. Code: `foundation/router.py`, `foundation/moe.py`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from foundation.exercises import ask, check
from foundation.moe import assign_slots, moe_backward, moe_forward
from foundation.optimizers import sgd_update
from foundation.router import choice_share, router_backward, router_forward

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## What reaches an expert that was not chosen
# Three tokens, six experts, top 2. The gradient of the logits, from the gates alone: zero everywhere but at the two
# that were chosen, and there the two entries cancel. With K = 1 the gate is $p_s$ itself, whose denominator sees every
# logit.

# %%
E, T = 6, 3
x = jnp.eye(T)[None]  # token t reads row t of the kernel: its row of the kernel's gradient is that of its logits
kernel = jax.random.normal(jax.random.key(3), (T, E))
zero = jnp.zeros(())
figure, axes = plt.subplots(1, 2, figsize=(11, 2.9), layout="constrained")
for ax, top_k in zip(axes, (2, 1), strict=True):
    routing, cache = router_forward(x, kernel, top_k)
    d_gates = jax.random.normal(jax.random.key(4), routing.gates.shape)
    _, d_logits = router_backward(d_gates, zero, zero, cache)
    by_jax = jax.grad(lambda w, k=top_k, d=d_gates: jnp.sum(d * router_forward(x, w, k)[0].gates))(kernel)
    assert jnp.max(jnp.abs(d_logits - by_jax)) < 1e-14
    bound = float(jnp.max(jnp.abs(d_logits)))
    ax.imshow(d_logits, cmap="RdBu_r", vmin=-bound, vmax=bound)
    for t in range(T):
        for e in range(E):
            chosen = e in routing.experts[0, t].tolist()
            text = f"{d_logits[t, e]:.3f}" if d_logits[t, e] else "0"
            colour = "white" if abs(d_logits[t, e]) > 0.6 * bound else "#223"
            weight = "bold" if chosen else "normal"
            ax.text(e, t, text, ha="center", va="center", fontsize=9, fontweight=weight, color=colour)
    ax.set(
        title=f"top {top_k}: gradient of the logits (bold: chosen)", xlabel="expert", ylabel="token", yticks=range(T)
    )
plt.show()

# %% [markdown]
# ## Dropped choices
# Four tokens want expert 0, which has two places. A dropped choice adds nothing to the output, so its gate gets a
# gradient of exactly 0, and the token reaches the next layer through the residual stream alone.

# %%
slot, keep = assign_slots(jnp.array([[[0], [0], [1], [0], [0]]]), 2, 2)
print("kept:", keep[0, :, 0].tolist())
params = {
    "router": jnp.array([[4.0, 0.0], [0.0, 0.0]]),
    "w_in": jax.random.normal(jax.random.key(0), (2, 2, 3)),
    "w_out": jax.random.normal(jax.random.key(1), (2, 3, 2)),
}
tokens = jnp.ones((1, 4, 2))
output, cache = moe_forward(tokens, params, top_k=1, capacity_factor=1.0)
d_x, _ = moe_backward(jnp.ones_like(tokens), zero, zero, cache)
print("outputs:  ", *(f"{v:7.3f}" for v in output.y[0, :, 0]))
print("gradients:", *(f"{v:7.3f}" for v in d_x[0, :, 0]), f"   ({100 * output.dropped:.0f} % dropped)")
assert (d_x[0, 2:] == 0.0).all()

# %% [markdown]
# ## Why a balance loss is needed
# A loss with no opinion on experts, and a router that starts with a small lean. $L_{balance} = E \sum_e f_e P_e$ is 1
# at balance; $f$ counts choices and is a constant to the derivative, so
#
# $$\frac{\partial L}{\partial p_{te}} = \frac{E f_e}{T}:$$
#
# the push away from an expert is as strong as that expert is popular. Below, gradient descent on the balance loss and
# the z-loss alone, by the hand-derived gradient.

# %%
E, T, D = 8, 64, 16
x = jax.random.normal(jax.random.key(5), (4, T, D)).at[..., 0].set(1.0)
start = 0.3 * jax.random.normal(jax.random.key(6), (D, E)).at[0].set(jnp.linspace(4.0, -4.0, E))


@jax.jit
def descend(kernel):
    routing, cache = router_forward(x, kernel, 2)
    no_task = jnp.zeros_like(routing.gates)
    _, d_kernel = router_backward(no_task, jnp.ones(()), jnp.full((), 1e-3), cache)
    share = choice_share(routing.experts, E, kernel.dtype).mean(axis=0)
    return sgd_update(d_kernel, kernel, 0.5), (routing.balance, share)


kernel, balances, shares = start, [], []
for _ in range(150):
    kernel, (balance, share) = descend(kernel)
    balances.append(float(balance))
    shares.append(np.asarray(share))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
left.plot(balances)
left.axhline(1.0, color="grey", ls="--", lw=1)
left.set(xlabel="step", ylabel="balance loss", title="1 is perfect balance")
right.stackplot(range(150), np.array(shares).T, colors=plt.cm.viridis(np.linspace(0, 1, E)), labels=range(E))
right.set(xlabel="step", ylabel="share of the choices", title="each band one expert", xlim=(0, 149), ylim=(0, 1))
plt.show()
print(f"balance loss {balances[0]:.3f} -> {balances[-1]:.3f}")
assert balances[-1] < balances[0]

# %% [markdown]
# ## Exercises

# %%
ask("7.1")
check("7.1", None)
ask("7.2")
check("7.2", None)

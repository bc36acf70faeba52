# %% [markdown]
# # 21. Rewards and preferences
#
# After training on text, a model can be trained on *judgements*: this answer is good,
# that one is better than the other. The formulas look familiar and the code is short.
# Then it turns out that two programs with the same "KL term" do different things, and
# that a third one's term does nothing. **Which KL does the KL term descend?** To find
# out, this chapter takes away what makes the subject hard, chance. All texts are
# listed, and every expectation is a sum. The code is `foundation/preferences.py`.
#
# ## Step 1: a policy
# A model that writes is called a **policy**, $\pi$. It gives each text $y$ a
# probability. Here it has 3 tokens and texts of 2, so 9 texts. Its logits $z$ are a
# table, [4, 3]: a row for each token that can come before, and a last one for the start
# of a text. The derivative of $\log \pi(y)$ in this table is called the **score** of
# the text, $s(y)$. Chapter 4 gives it, a softmax at a time: $\partial \log p_v /
# \partial z = \text{onehot}_v - p$.
#
# Everything below rests on one fact. Probabilities add up to 1, so
#
# $$\sum_y \pi(y)\,s(y) = \sum_y \frac{\partial \pi(y)}{\partial z} = \frac{\partial\,
# 1}{\partial z} = 0.$$
#
# ## Step 2: rewards
# Each text has a **reward** $r(y)$. The policy should make $J = \sum_y \pi(y)\,r(y)$
# large. Since $\partial \pi = \pi\, s$,
#
# $$\boxed{\;\frac{\partial J}{\partial z} = \sum_y \pi(y)\,(r(y) - b)\,s(y)\;}$$
#
# for *every* number $b$, by the fact above. In practice a few texts are drawn from
# $\pi$, and the sum is a mean over them. A good **baseline** $b$ makes this mean less
# noisy, and leaves its expectation alone.

# %%
from foundation import preferences
from foundation.lessons.notebook import agree, check, jax, jnp, np, pictures, shown

shown(preferences.text_log_probs_forward, preferences.text_log_probs_backward)

# %%
texts = preferences.all_texts(3, 2)
keys = jax.random.split(jax.random.key(0), 3)
logits = jax.random.normal(keys[0], (4, 3))
reference = jax.random.normal(keys[1], (4, 3))
reward = jax.random.normal(keys[2], (9,))

log_pi, texts_cache = preferences.text_log_probs_forward(logits, texts)
pi = jnp.exp(log_pi)
print("the probabilities of the nine texts:", np.round(pi, 3))
zero = preferences.text_log_probs_backward(pi, texts_cache)
print(f"sum of pi times score: at most {jnp.max(jnp.abs(zero)):.0e}")
assert jnp.max(jnp.abs(zero)) < 1e-15

# %% [markdown]
# ## Step 3: a group as its own baseline
# Where does $b$ come from? A popular method, GRPO, draws a **group** of $G$ texts and
# takes the mean of their rewards. But each text's own reward is in this mean. So $b$ is
# *not* a constant, and the argument above does not apply. What is the expected
# gradient?
#
# Split the mean. The rewards of the other $G-1$ texts do not depend on text $i$, so
# they are a constant to it, and contribute nothing. Its own reward, divided by $G$,
# stays:
#
# $$\mathbb E\Bigl[\frac1G \sum_i (r_i - \bar r)\,s_i\Bigr] = \Bigl(1 - \frac1G\Bigr)
# \frac{\partial J}{\partial z}.$$
#
# The direction is right, and the step is a little short. That is harmless:

# %%
one = jnp.ones(())
_, cache = preferences.expected_reward_forward(logits, reward, texts)
exact = preferences.expected_reward_backward(one, cache)
for group in (2, 3):
    _, cache = preferences.group_baseline_forward(logits, reward, texts, group)
    ours = preferences.group_baseline_backward(one, cache)
    agree(f"groups of {group}, and (1 - 1/G) dJ", ours, (1 - 1 / group) * exact, 1e-13)

# %% [markdown]
# GRPO also divides by the group's standard deviation. This is *not* harmless: it
# changes the direction. Groups whose rewards are nearly equal get the largest weights.
# Here are all $9^3$ groups of three texts, each with its probability:

# %%
groups = preferences.all_texts(9, 3)
drawn = reward[groups]
advantage = (drawn - drawn.mean(1, keepdims=True)) / (
    drawn.std(1, keepdims=True) + 1e-6
)
chance = jnp.prod(pi[groups], axis=1, keepdims=True)
by_text = jnp.zeros(9).at[groups].add(chance * advantage / 3)
divided = preferences.text_log_probs_backward(by_text, texts_cache)
cosine = jnp.vdot(divided, exact) / jnp.linalg.norm(divided) / jnp.linalg.norm(exact)
print(f"divided by the spread: cosine to dJ {cosine:.4f}")
assert cosine < 0.9999

# %% [markdown]
# ## Step 4: which KL?
# A policy that only chases rewards forgets how to write. So it is kept near a
# **reference** by the **Kullback-Leibler divergence**,
#
# $$\mathrm{KL}(\pi\,\|\,\text{ref}) = \sum_y \pi(y) \log\frac{\pi(y)}{\text{ref}(y)}.$$
#
# From samples of $\pi$, with $\rho = \text{ref}(y)/\pi(y)$, three estimators are used:
#
# $$k_1 = -\log\rho, \qquad k_2 = \tfrac12 (\log\rho)^2, \qquad k_3 = \rho - 1 -
# \log\rho.$$
#
# As **numbers**, $k_1$ and $k_3$ have the right mean, and $k_3$ is never negative. So
# $k_3$ looks best, and it is what many programs use as a **loss**. But a loss is not
# used as a number. It is *differentiated*, and the samples, once drawn, are held fixed.
# That is another expectation. With $\partial \log\rho = -s$:
#
# | loss | its gradient at one text | expected over $\pi$ | so it descends |
# |---|---|---|---|
# | $k_1$ | $s$ | $0$ | nothing |
# | $k_2$ | $-\log\rho\; s$ | $-\sum \pi \log\rho\; s$ | KL(π‖ref) |
# | $k_3$ | $(1-\rho)\, s$ | $-\sum \text{ref}\; s$ | KL(ref‖π) |
#
# The second line is the gradient of the KL that was meant. (Differentiate it: the term
# from the logarithm is $\sum \pi s = 0$.) The third is the gradient of the *other* KL,
# with the two exchanged. And the first one is zero, on average: as a loss, $k_1$ is
# noise. In the *reward* it is right. There the text with the reward $r - \beta k_1$ has
# the gradient $(r - \beta k_1)\,s$, and $\sum \pi\, k_1\, s = -\sum \pi \log\rho\; s$
# is the second line, exactly.

# %%
shown(preferences.kl_backward_by_k2, preferences.reverse_kl_backward_by_k3)

# %%
log_ref, _ = preferences.text_log_probs_forward(reference, texts)


def expected_gradients(z):
    """Of each estimator as a loss, and of k1 in the reward."""
    log_pi, texts_cache = preferences.text_log_probs_forward(z, texts)
    _, kl_cache = preferences.kl_forward(z, reference, texts)
    _, reverse_cache = preferences.reverse_kl_forward(z, reference, texts)
    pi, k1 = jnp.exp(log_pi), log_pi - log_ref
    return {
        "k1": preferences.text_log_probs_backward(pi, texts_cache),
        "k2": preferences.kl_backward_by_k2(one, kl_cache),
        "k3": preferences.reverse_kl_backward_by_k3(one, reverse_cache),
        "k1 in the reward": preferences.text_log_probs_backward(pi * k1, texts_cache),
    }


by_jax = jax.grad(lambda z: preferences.kl_forward(z, reference, texts)[0])(logits)
for name in ("k2", "k1 in the reward"):
    ours = expected_gradients(logits)[name]
    agree(f"{name}, and the gradient of KL(pi || ref)", ours, by_jax, 1e-13)

# %% [markdown]
# Where does each of them lead? Ascend the expected reward minus $\beta$ times the term,
# from the reference. The dashed line is the exact answer, from step 5. With $k_2$ the
# policy goes to it. With $k_3$ it comes to rest somewhere else, and is held back too
# much. With $k_1$ nothing holds it, and it goes on to the single best text.

# %%
BETA, STEPS, RATE = 0.5, 400, 0.5


@jax.jit
def look(z):
    """How far z is from the reference, and the way up by each estimator."""
    _, cache = preferences.expected_reward_forward(z, reward, texts)
    d_reward = preferences.expected_reward_backward(one, cache)
    ways = {n: d_reward - BETA * term for n, term in expected_gradients(z).items()}
    return preferences.kl_forward(z, reference, texts)[0], ways


best = jax.nn.log_softmax(log_ref + reward / BETA)
level = float(jnp.sum(jnp.exp(best) * (best - log_ref)))
paths, ends = {}, {"best": best}
for name in ("k1", "k2", "k3"):
    z, path = reference, []
    for _ in range(STEPS):
        kl, ways = look(z)
        path.append(float(kl))
        z = z + RATE * ways[name]
    paths[f"with {name}"] = path
    ends[name], _ = preferences.text_log_probs_forward(z, texts)
panel = {"how far the policy goes from the reference": paths}
pictures.curves(panel, "step", "KL(pi || ref)", level=level)
for name, log_pi in ends.items():
    value = jnp.sum(jnp.exp(log_pi) * (reward - BETA * (log_pi - log_ref)))
    print(f"{name:>4}: reward - beta KL = {value:.4f}")

# %% [markdown]
# ## Step 5: from preferences to a loss
# Often there are no rewards, only pairs: text $w$ was preferred to text $l$. Suppose
# this happens with the probability $\sigma(r_w - r_l)$, $\sigma(x) = 1/(1+e^{-x})$. And
# suppose we want the policy that maximises $\mathbb E\,r - \beta\,
# \mathrm{KL}(\pi\|\text{ref})$. With a multiplier $\lambda$ for $\sum\pi = 1$, the
# derivative by one $\pi(y)$ must be zero:
#
# $$r(y) - \beta\Bigl(\log\frac{\pi(y)}{\text{ref}(y)} + 1\Bigr) - \lambda = 0.$$
#
# Solved for $\pi(y)$, with the factors that do not depend on $y$ as $1/Z$:
#
# $$\pi(y) = \frac{\text{ref}(y)\,e^{r(y)/\beta}}{Z}, \qquad\text{so}\qquad r(y) =
# \beta\log\frac{\pi(y)}{\text{ref}(y)} + \beta\log Z.$$
#
# Put this $r$ into the probability of the preference. $Z$ is the same for both texts
# and cancels. A loss on the policy alone is left, **DPO**:
#
# $$m = \beta\Bigl[\log\frac{\pi(w)}{\text{ref}(w)} - \log\frac{\pi(l)}{\text{ref}(l)}
# \Bigr], \qquad L = -\log\sigma(m), \qquad \boxed{\;\frac{\partial L}{\partial
# \log\pi(w)} = -\beta\,\sigma(-m)\;}$$
#
# and the negative for $l$. A pair that is already judged rightly, by far, gets nothing.
# That the loss is at rest exactly where rewards tilt the reference is a test of this
# chapter, over all pairs.
#
# ## Step 6: a clip
# To use samples more than once, PPO remembers the policy $\pi_{old}$ that drew them. It
# weighs each by $\rho = \pi/\pi_{old}$ (not the $\rho$ of step 4). With the
# **advantage** $A = r - b$ of step 2, and a small number $\epsilon$, such as 0.2, it
# maximises
# $\min(\rho A,\ \operatorname{clip}(\rho, 1-\epsilon, 1+\epsilon)\,A)$. The clip has no
# gradient. When is it the smaller one? Only where $\rho$ has moved in the direction
# that $A$ asks for, by more than $\epsilon$. A text that moved the *wrong* way always
# keeps its gradient. At the first step $\rho = 1$, nothing is clipped, and the gradient
# is the one of step 2.
#
# ## The answer
# $k_2$ descends the KL that everybody writes down, $k_3$ the reverse one, and $k_1$
# none. An estimator that is right as a number can be wrong as a loss. Before a formula
# is trusted with samples, list everything once, and add it up: so the table holds each
# expected gradient against autodiff of the exact value.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive expected_reward`, then `derive
# dpo`.

# %%
check("21.1", None)

# %%
check("21.2", None)

# %%
check("21.3", None)

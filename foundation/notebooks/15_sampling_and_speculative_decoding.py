# %% [markdown]
# # 15. Sampling and speculative decoding
#
# A model gives a number for each token of its vocabulary. A program turns these numbers
# into *one* token, by chance: by which law? And a large model needs a pass through all
# its weights for each token, while a small one is quick, and mostly right about easy
# words. **Can a small model guess for a large one and change nothing?** Yes: the text
# has the law of the large model, exactly, whatever the small one says. The proof is one
# line, and we check it by adding up every way in which a text can come about.
#
# The code is `foundation/sampling.py`. The project draws its tokens in
# `moe_jax/inference/sampling.py`, with the filters of step 1; a test compares the two
# laws. It does not guess: a pass over several tokens of a small mixture reads the
# experts of each of them.
#
# ## Step 1: which law?
# The logits $z$ become probabilities by a softmax. Before it they are divided by a
# **temperature** $\tau$: below 1 the likely tokens become likelier, and at 0 the
# likeliest token is always taken. A language model gives a little probability to
# thousands of bad tokens, and one bad token can spoil a text. So **filters** leave some
# out:
#
# - **top-k**: keep the k likeliest.
# - **top-p**: keep the fewest likeliest tokens that together reach the probability $p$.
# - **min-p**: keep those with at least a given share of the *largest* probability.
#
# What is kept is divided by its sum. Two details are easily missed. In top-p, the token
# that *crosses* the line is kept: it is needed to reach $p$. In code: a token stays if
# the mass of the tokens *before* it is below $p$. And every filter here looks at the
# law after temperature, not at what another filter left. Programs differ in this; one
# has to say what one does.

# %%
from foundation import sampling
from foundation.lessons.notebook import check, jnp, np, pictures, shown

shown(sampling.filtered_law)

# %%
logits = jnp.log(jnp.array([0.40, 0.25, 0.15, 0.10, 0.06, 0.04]))
for name, settings in {
    "as it is": (1.0, 0, 1.0, 0.0),
    "temperature 1/2": (0.5, 0, 1.0, 0.0),
    "top-k 3": (1.0, 3, 1.0, 0.0),
    "top-p 0.7": (1.0, 0, 0.7, 0.0),
    "min-p 0.2": (1.0, 0, 1.0, 0.2),
    "temperature 0": (0.0, 0, 1.0, 0.0),
}.items():
    print(f"{name:<16}", np.round(sampling.filtered_law(logits, *settings), 3))

# %% [markdown]
# ## Step 2: propose, accept or replace
# Let $p$ be the law of the large model for the next token, filters and all. Let $q$ be
# the law of the small one, the **draft**. It proposes a token $x$, drawn from $q$. Now
# compare:
#
# - If $q_x \le p_x$, the draft proposes $x$ too rarely. **Accept** it.
# - If $q_x > p_x$, it proposes $x$ too often. Accept with probability $p_x / q_x$.
#
# Together: accept with probability $\min(1, p_x/q_x)$. If $x$ is rejected, draw another
# token from the **residual**, which is what $p$ has and $q$ has not:
#
# $$r_x = \frac{(p_x - q_x)^+}{\sum_y (p_y - q_y)^+}, \qquad a^+ = \max(a, 0).$$
#
# ## Step 3: the law of what comes out
# Token $x$ can come out in two ways. Either it is proposed and accepted, which has the
# probability
#
# $$q_x \min(1, p_x/q_x) = \min(p_x, q_x).$$
#
# Or something is rejected, and $x$ is drawn from the residual. The probability that
# something is rejected is one minus all that is accepted:
#
# $$1 - \sum_y \min(p_y, q_y) = \sum_y \bigl(p_y - \min(p_y, q_y)\bigr) = \sum_y (p_y -
# q_y)^+.$$
#
# That is exactly the divisor of $r$. It cancels:
#
# $$\boxed{\;\min(p_x, q_x) + (p_x - q_x)^+ = p_x\;}$$
#
# Nothing was assumed about $q$. A bad draft is rejected often and saves no time, and
# even then the text is right. The picture shows both parts, standing on each other:
# they fill $p$, whatever the line of $q$ does. On the right is a **sure** draft, which
# always proposes token 2. With $q$ a single 1, the same rule works.

# %%
shown(sampling.accepted_mass, sampling.residual_law, sampling.speculative_law)

# %%
p = jnp.array([0.38, 0.22, 0.16, 0.12, 0.08, 0.04])
drafts = {
    "a good draft": jnp.array([0.30, 0.30, 0.14, 0.10, 0.10, 0.06]),
    "a poor draft": jnp.array([0.05, 0.10, 0.10, 0.25, 0.20, 0.30]),
    "a sure draft": jnp.eye(6)[2],
}
panels = {}
for name, q in drafts.items():
    accepted = sampling.accepted_mass(p, q)
    replaced = (1 - jnp.sum(accepted)) * sampling.residual_law(p, q)
    panels[name] = {"accepted": accepted, "from the residual": replaced}
    error = jnp.max(jnp.abs(sampling.speculative_law(p, q) - p))
    print(f"{name}: accepted {jnp.sum(accepted):.2f}, off by {error:.0e}")
    assert error < 1e-15
pictures.stacked(panels, drafts, "token")

# %% [markdown]
# ## Step 4: a favourite mistake
# Drafts are often run at temperature 0, since the likeliest token is the best guess.
# That is allowed, *if the rule is told*. The law of such a draft is a single 1. A
# program that proposes the likeliest token, and then compares $p_x$ with the softmax
# probability $q_x$, uses a law from which nothing was drawn. What comes out is not $p$.
# The distance of two laws is measured by the **total variation**, half the sum of $|p_x
# - q_x|$: the largest difference that any event's probability can have.

# %%
q = drafts["a poor draft"]
x = jnp.argmax(q)
accept = jnp.minimum(1.0, p[x] / q[x])
assert accept < 1
wrong = accept * jnp.eye(6)[x] + (1 - accept) * sampling.residual_law(p, q)
told = sampling.speculative_law(p, jnp.eye(6)[x])
for name, law in {"compared with q": wrong, "told": told}.items():
    print(f"greedy, {name:<16} total variation {jnp.sum(jnp.abs(law - p)) / 2:.2f}")
assert abs(jnp.sum(jnp.abs(wrong - p)) / 2 - 233 / 850) < 1e-12  # by hand, in fractions

# %% [markdown]
# ## Step 5: a round of n
# One proposal saves nothing: the large model still runs for each token. But it can
# judge *several* in one pass, just as in training it gives logits for all positions at
# once. So the draft proposes $n$ tokens, each after the one before. The large model
# runs once. Going from left to right, proposals stay until the first rejection. Then
# comes one token from the residual, and the rest is thrown away. If all are accepted,
# the large model has given one more law for free, and one more token is drawn from it.
#
# Each position follows the rule of step 2, given the text before it. So by induction
# each token has the law of the large model, and the law of a *text* is the product. To
# check this, take three tokens and two models that look at one token back. Add up every
# way to write four tokens: every proposal, rejection and replacement, and rounds that
# end anywhere.

# %%
random = np.random.default_rng(0)
target, draft = (jnp.asarray(random.dirichlet([0.7] * 3, 3)) for _ in range(2))
product = jnp.einsum("sa,ab,bc,cd->sabcd", target, target, target, target)
for drafted in (1, 2, 4):
    law = sampling.speculative_texts(target, draft, drafted, 4)
    error = jnp.max(jnp.sum(jnp.abs(law - product), axis=(1, 2, 3, 4))) / 2
    print(f"{drafted} drafted: total variation {error:.0e} over 81 texts")
    assert error < 1e-14

# %% [markdown]
# ## Step 6: how much it saves
# Let each proposal be accepted with probability $a$. Step 3 says what $a$ is: the sum
# of $\min(p, q)$, one minus the total variation. A round gives at least one token. It
# gives a second one if the first proposal is accepted, a third one if the first two
# are, and so on:
#
# $$1 + a + a^2 + \dots + a^n = \frac{1 - a^{n+1}}{1 - a}.$$
#
# At $a = 0.8$ and $n = 4$ that is 3.4 tokens for one pass of the large model. More
# proposals soon bring little, because all of them must be accepted. And the draft's
# time must be paid. For a mixture of experts there is one more cost. One token reads K
# experts. A round of $n + 1$ tokens reads the experts of all of them, so the pass of
# the large model gets slower with $n$, until all experts are read.

# %%
for a in (0.5, 0.8, 0.95):
    counts = [float(sampling.tokens_per_round(jnp.asarray(a), n)) for n in (1, 2, 4, 8)]
    print(f"a = {a}: tokens for 1, 2, 4, 8 proposals:", np.round(counts, 2))
    assert abs(counts[2] - (1 - a**5) / (1 - a)) < 1e-12

# %% [markdown]
# ## Exercises

# %%
check("15.1", None)

# %%
check("15.2", None)

# %%
check("15.3", None)

# %% [markdown]
# # A mixture of experts in ten minutes
#
# A language model reads a text piece by piece and guesses the next piece. A piece is
# called a **token**: a word, or a part of one. In most models every token passes
# through the same network. In a **mixture of experts** a layer has several small
# networks side by side, the **experts**. A **router** reads each token and picks a
# few experts for it. The others do nothing. So the model can know much, and still
# compute little for each token.
#
# We take a trained model apart: watch it route a sentence, switch an expert off, and
# send everything to one expert.
#
# The model comes with the package: it is small, and has read stories that a grammar
# writes. So nothing is trained here. In Colab, install the package first:
# `%pip install moe_jax-0.2.0-py3-none-any.whl`.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

import moe_jax

run = moe_jax.load_run("nano")
shape = run.config.model
L, E, K = shape.layers, shape.experts, shape.routing.top_k
print(f"{L} layers of {E} experts; each token goes to {K} of them")

# %% [markdown]
# It has read thousands of small stories. Give it the beginning of one:

# %%
START = "Once upon a windy morning, a brave girl"


def tell(title, model):
    """Show what a model makes of the same beginning, with the same random numbers."""
    display(Markdown(f"**{title}:** {model.generate(START, max_tokens=80)}"))


tell("The model", run)

# %% [markdown]
# ## Route a sentence
# `run.trace` returns every decision. Below, each token has the colour of the expert
# that it chose first, in each layer. Look for tokens of one kind that share a colour:
# names, commas, colours, little words. The first token, `<|endoftext|>`, stands between
# two stories.

# %%
TEXT = (
    "Once upon a windy morning, a brave girl named Nora put on her fancy vest"
    " and hurried to the jungle. Nora brought a big plum."
)
trace = run.trace(TEXT)
display(trace)

# %% [markdown]
# The router gives every expert a **probability** and takes the largest few. The
# probabilities of the experts taken are scaled so that they add up to 1. These are the
# **gates**: the answer of the layer is the sum of the experts' answers, each times its
# gate. Here are the probabilities in layer 0. A dot marks an expert that was taken.

# %%
show = slice(1, 23)
words = [piece.strip() for piece in trace.pieces[show]]
figure, ax = plt.subplots(figsize=(10, 3), layout="constrained")
ax.imshow(trace.probs[0, show].T, cmap="Blues", vmin=0, vmax=0.8, aspect="auto")
for k in range(K):
    ax.plot(trace.expert_index[0, show, k], "o", color="#d1480f", ms=5)
ax.set_xticks(range(len(words)), words, rotation=60, ha="right")
ax.set(ylabel="expert", yticks=range(E), title="Layer 0: probability of each expert")
plt.show()

# %% [markdown]
# Does each expert get its share of the work? In training an expert has a fixed number
# of places in a window of text, its **capacity**. A token that comes when they are
# taken goes on without that expert: it is **dropped**. A second loss in training keeps
# the shares nearly even over whole windows of text, so few tokens are dropped. One
# short text, as here, may still load its experts unevenly:

# %%
share = trace.load() / trace.load().sum(1, keepdims=True)
for layer in range(L):
    row = "  ".join(f"{100 * s:3.0f} %" for s in share[layer])
    print(f"layer {layer}:  {row}")
print(f"even would be {100 / E:.1f} % each")

# %% [markdown]
# ## Switch an expert off
# What is one expert good for? Forbid the router to choose it. The next-best expert
# then takes its place. Nothing else changes and nothing is trained again.
#
# We measure the **loss**: minus the logarithm of the probability that the model gave
# to the token that really came. 0 is perfect. 0.69 more means half the probability.
# `run.ablation` switches off every expert in turn. Each number below is the mean
# change of the loss over the tokens of the text.

# %%
found = run.ablation(TEXT)
mean = found.change.mean(-1)
figure, ax = plt.subplots(figsize=(8, 0.6 * L + 1.2), layout="constrained")
bound = np.abs(mean).max()
ax.imshow(mean, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
for layer in range(L):
    for expert in range(E):
        value = mean[layer, expert]
        colour = "white" if abs(value) > 0.6 * bound else "black"
        ax.text(expert, layer, f"{value:+.2f}", ha="center", va="center", color=colour)
ax.set(xlabel="expert that is off", ylabel="layer", yticks=range(L), xticks=range(E))
ax.set_title(f"Change of the loss (it is {found.loss.mean():.2f} with all experts)")
plt.show()

# %% [markdown]
# Take the expert that the text misses most. Most tokens hardly notice. A few become
# less likely:

# %%
layer, expert = map(int, np.unravel_index(mean.argmax(), mean.shape))
change = found.change[layer, expert]
print(f"without expert {expert} of layer {layer}:")
for i in np.argsort(-change)[:6]:
    before = "".join(trace.pieces[max(i - 3, 1) : i + 1])
    chances = np.exp(-np.array([found.loss[i], found.loss[i] + change[i]]))
    was, now = (f"{100 * p:.1f} %" for p in chances)
    print(f"{before.strip():>28} [{trace.pieces[i + 1].strip()}]   {was:>7} -> {now}")

# %% [markdown]
# `run.switch_off` gives the same model with an expert off, and it can do all that the
# model can do. Let every expert be off in turn and write the same story again, with the
# same random numbers, so what differs is the work of that one expert. Without some
# experts the story stays as it is: others know the same. We show the expert whose
# absence changes the story soonest.


# %%
def same(text, other):
    """How many characters two texts share before they differ."""
    pairs = zip(text, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(text))


story = run.generate(START, max_tokens=80)
shared = {}
for layer in range(L):
    for expert in range(E):
        other = run.switch_off(layer, expert).generate(START, max_tokens=80)
        shared[layer, expert] = same(story, other)
layer, expert = min(shared, key=shared.get)
changed = sum(length < len(story) for length in shared.values())
print(f"{changed} of {L * E} experts change the story")
tell("All experts", run)
tell(f"Without expert {expert} of layer {layer}", run.switch_off(layer, expert))

# %% [markdown]
# ## Force everything to one expert
# Now the opposite: in every layer, all tokens must go to expert 0. This is a smaller
# model without a choice. If all experts had learned the same, nothing would change.
# The loss below is that of whole stories, which the model has not seen in training.

# %%
alone = run
for each in range(L):
    alone = alone.force(each, 0)
scored = run.evaluate()
print(f"the router chooses:  loss {scored.loss:.2f}")
print(f"always expert 0:     loss {alone.evaluate().loss:.2f}")
tell("Always expert 0", alone)

# %% [markdown]
# It is lost: the experts have learned different things, and the router knows who knows
# what.
#
# ## Was it worth it?
# The fair question is: against what? The **dense twin** has no router and one network
# in each layer. The network is as large as the experts that one token uses. So the
# twin computes about as much for each token, and holds fewer parameters. `uv run
# train.py --model.dense active` trains it on the same text, in minutes. It writes to
# `runs/nano-dense-active`, which `load_run` opens.
#
# The measure is **bits per byte** on stories that neither has seen: how many bits each
# byte of text costs if the model's guesses are used to compress it. Lower is better.
# On average no model can be below 0.252 on such stories, for they are made with that
# much chance.

# %%
print(f"{scored.bits_per_byte:.4f} bits per byte")

# %% [markdown]
# `nano` is too small to decide the question: on such easy stories the twin comes almost
# as close. On TinyStories, at the size of `story-cpu`, the mixture needs fewer bits for
# the same arithmetic; the README has the numbers. A mixture pays with memory, for all
# its experts must be stored, and with time, for bringing tokens to their experts and
# back is work too. Whether that is a bargain depends on what is scarce.
#
# ## Where to go on
# - `uv run moe-jax inspect --run nano --text "your words"` makes a page of all this,
#   for any text: colours, slots, and every expert switched off.
# - `moe_jax.load_run("stories")` is a larger model, which has read TinyStories.
# - `foundation/notebooks/` derives each gradient by hand: chapter 8 is the router.
# - Try: switch off two experts of a layer (`run.switch_off(0, 1, 2)`). Force only the
#   last layer. Trace a sentence that no story would hold.

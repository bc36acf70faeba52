# %% [markdown]
# # 19. Collectives and their adjoints
#
# A model that does not fit one device is spread over several. Its devices then have to
# talk in the middle of the forward pass. So the *backward* pass has to talk as well.
# **What does a gradient do on its way back through many devices?** The answer needs no
# new mathematics, only the eyes to see that a message is a matrix.
#
# The code is `foundation/collectives.py`. The project does this in
# `moe_jax/parallel/experts.py` and, for weights in parts, `moe_jax/parallel/layout.py`.
#
# ## Step 1: a device is an index
# Call the devices **ranks**, $r = 0, \dots, R-1$. Write $x_r$ for what rank $r$ has,
# and put all of it into one array with the rank as its first axis. Then a
# **collective**, an exchange in which all ranks take part, is a function from one array
# to another. And it only copies and adds. So it is *linear*: $y = A x$ for some matrix
# of zeros and ones, whose entry $A_{(r,i),(s,j)}$ is 1 if number $j$ of rank $s$ goes
# into number $i$ of rank $r$.
#
# The gradient of a linear map is its transpose: $d_x = A^\top d_y$. Transposing
# exchanges the two ends of every wire. **Who sent, receives. Who copied, adds up.**
#
# ## Step 2: the five that everybody uses
# Read each from its wires:
#
# | forward | what it does | backward |
# |---|---|---|
# | copy to all | one array to every rank | sum |
# | all-reduce | the sum, to every rank | all-reduce |
# | all-gather | all parts, to every rank | reduce-scatter |
# | reduce-scatter | the sum of part $r$, to rank $r$ | all-gather |
# | all-to-all | part $s$ of rank $r$ becomes part $r$ of rank $s$ | all-to-all |
#
# The third and the fourth are each other's transpose. The last one only exchanges pairs
# of parts, so it is its own transpose. Below are the matrices of these three, for three
# ranks. A dark field is a 1: a wire from the number of its column to the number of its
# row. (The line with `XLA_FLAGS` makes eight devices of one processor, for step 7.)

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
from foundation import collectives
from foundation.lessons.notebook import agree, check, jax, jnp, np, pictures, shown

shown(
    collectives.all_reduce_forward,
    collectives.all_gather_forward,
    collectives.reduce_scatter_forward,
    collectives.all_to_all_forward,
)


# %%
def matrix_of(collective, *shape):
    """The matrix of a linear map, column by column: what it makes of each unit."""
    size = int(np.prod(shape))
    units = jnp.eye(size).reshape(size, *shape)
    return np.stack([np.asarray(collective(u)[0]).ravel() for u in units], axis=1)


gather = matrix_of(collectives.all_gather_forward, 3, 1)
scatter = matrix_of(collectives.reduce_scatter_forward, 3, 3)
reduce = matrix_of(collectives.all_reduce_forward, 3, 1)
exchange = matrix_of(collectives.all_to_all_forward, 3, 3, 1)
assert (scatter == gather.T).all()
assert (reduce == reduce.T).all()
assert (exchange == exchange.T).all()
panels = {"all-gather": gather, "reduce-scatter": scatter, "all-to-all": exchange}
axes = ("number of the input, rank by rank", "number of the output")
pictures.heatmaps(panels, *axes, numbers="", diverging=False)

# %% [markdown]
# ## Step 3: the factor R
# After an all-reduce, every rank has the same sum. Each can compute the same loss $L$
# from it. There is *one* loss, though it stands in $R$ places. But a program on each
# rank does not know that. If each starts its backward pass with $d_L = 1$, what is
# differentiated is $L + L + \dots + L$, and every gradient is $R$ times too large.
#
# This is easy to miss. Adam divides a gradient by its size, so the factor cancels in
# every step. Only clipping, a plain gradient step, and a weight decay that is added to
# the gradient show it. The cure is to say which of the $R$ equal numbers counts, or to
# give each rank $d_L = 1/R$.
#
# ## Step 4: how a sum is made
# Nobody can talk to everybody at once. On a **ring**, each rank talks only to the next.
# Cut the array into $R$ parts. In each step every rank passes on one part, and adds
# what arrives to its own. After $R-1$ steps each rank has one whole part. In $R-1$ more
# steps, the whole parts go round. Every rank has sent
#
# $$2\,\frac{R-1}{R}$$
#
# times the array: nearly twice, for 2 ranks or for 2,000.

# %%
for ranks in (2, 4, 8):
    x = jax.random.normal(jax.random.key(ranks), (ranks, 840))
    total, sent = collectives.ring_all_reduce(x)
    np.testing.assert_allclose(total, collectives.all_reduce_forward(x)[0], atol=1e-12)
    print(f"{ranks} ranks: each sends {sent / 840:.3f} times the array")

# %% [markdown]
# ## Step 5: one layer on many ranks (Megatron's f and g)
# A network $y = \phi(x W_1)\,W_2$ can be cut along its hidden columns. Rank $r$ has its
# columns of $W_1$ and the rows of $W_2$ that belong to them. $\phi$ is elementwise, so
# the ranks need not talk in the middle:
#
# $$y = \sum_r \phi(x W_{1,r})\, W_{2,r}.$$
#
# Megatron-LM calls the two ends **f** and **g**. Forward, f only hands $x$ to all
# ranks, and g is an all-reduce. Backward they change places, as the table of step 2
# says: g hands $d_y$ to all, and f adds up,
#
# $$\boxed{\;d_x = \sum_r \bigl(\phi'(x W_{1,r}) \odot d_y W_{2,r}^\top\bigr)
# W_{1,r}^\top\;}$$
#
# So a network costs one all-reduce in each direction. Weights and their gradients stay
# where they are. Attention is cut by heads in the same way.
#
# ## Step 6: weights in parts (FSDP)
# Data parallelism keeps all N weights, their gradient and their moments on every rank.
# Fully sharded, a rank keeps $N/R$ of each. Before a layer runs, an all-gather makes
# its weights whole; then they are forgotten. On the way back they are gathered once
# more, and the adjoint of gathering does the sum: $d_W$ of every rank goes through a
# **reduce-scatter**, which leaves each rank the part that it steps.
#
# What is sent? An all-reduce is a reduce-scatter and an all-gather: $2N(R-1)/R$. FSDP
# gathers twice and scatters once: $3N(R-1)/R$. Half as much again, for $1/R$ of the
# memory. With Adam in float32 (16 bytes for each weight: itself, its gradient, two
# moments) 7 billion weights take 112 GB on each rank, or 14 GB on each of 8.

# %%
shown(
    collectives.tensor_parallel_forward,
    collectives.tensor_parallel_backward,
    collectives.sharded_backward,
)

# %% [markdown]
# ## Step 7: a mixture of experts
# Give each rank one expert. A token on rank $r$ that chooses expert $e$ must travel to
# rank $e$, and the answer must travel back. Each rank sorts its tokens by expert into
# rows, [E, C, D], with $C$ **slots** for each expert. An all-to-all sends part $e$ to
# rank $e$. There the expert works on the rows of all ranks at once. A second all-to-all
# takes the answers home.
#
# Now walk back. The gradient of the answers takes the first all-to-all to the experts,
# and there it meets the rows that are still there:
#
# $$\boxed{\;d_{W_e} = \sum_{\text{rows at } e} \text{row}^\top\, d_{\text{answer}}\;}$$
#
# This is the whole gradient of $W_e$: the tokens of *all* ranks came to it, so nothing
# has to be added up over ranks. Copies of a weight are different: there the gradients
# of all ranks must be summed. This is why a mixture of experts can grow with the number
# of devices. If each expert exists once, the largest part of the gradient needs no
# all-reduce. (Experts with copies, on another axis of the mesh, are summed as well.)
#
# The same on eight simulated devices, with the real exchange: `shard_map` runs one
# function on each device, with its part of the arrays.

# %%
shown(collectives.expert_parallel_forward, collectives.expert_parallel_backward)

# %%
R, T, D = 8, 6, 4
keys = jax.random.split(jax.random.key(0), 4)
x, d_y = jax.random.normal(keys[0], (2, R, T, D))
gate = jax.nn.sigmoid(jax.random.normal(keys[1], (R, T)))
W = jax.random.normal(keys[2], (R, D, D))
expert = jax.random.randint(keys[3], (R, T), 0, R)
earlier = (expert[:, :, None] == expert[:, None, :]) & jnp.tri(T, k=-1, dtype=bool)
slot = jnp.sum(earlier, axis=2)  # the expert's tokens before this one
place = (expert[..., None] == jnp.arange(R))[..., None]
place &= slot[..., None, None] == jnp.arange(T)  # [R, T, E, C]

mesh = jax.make_mesh((R,), ("rank",), axis_types=(jax.sharding.AxisType.Auto,))
print(len(mesh.devices), "devices")


def on_one_device(x, gate, W, place, d_y):
    """What each device does. Its own arrays have a first axis of length 1."""
    at = place[0].astype(x.dtype)

    def exchange(rows):  # [R, C, D]: part e to rank e
        return jax.lax.all_to_all(rows, "rank", 0, 0, tiled=True)

    rows = exchange(jnp.einsum("tec,td->ecd", at, x[0]))
    results = exchange(rows @ W[0])
    y = gate[0][:, None] * jnp.einsum("tec,ecd->td", at, results)
    d_answers = exchange(jnp.einsum("tec,td->ecd", at, gate[0][:, None] * d_y[0]))
    d_W = jnp.einsum("rcd,rcf->df", rows, d_answers)
    d_x = jnp.einsum("tec,ecd->td", at, exchange(d_answers @ W[0].T))
    return y[None], d_x[None], d_W[None]


split = jax.P("rank")
spread = jax.jit(
    jax.shard_map(on_one_device, mesh=mesh, in_specs=split, out_specs=split)
)
y, cache = collectives.expert_parallel_forward(x, gate, W, place)
d_x, _, d_W = collectives.expert_parallel_backward(d_y, cache)
theirs = spread(x, gate, W, place, d_y)
agree("y, d_x, d_W: eight devices and an array axis", theirs, (y, d_x, d_W), 1e-12)
compiled = spread.lower(x, gate, W, place, d_y).compile().as_text() or ""
for collective in ("all-to-all", "all-reduce"):
    print(f"{collective}s in the program:", compiled.count(f" {collective}("))
assert " all-reduce(" not in compiled

# %% [markdown]
# The compiled program says the same: two all-to-alls on the way there, two on the way
# back, and not one all-reduce.
#
# ## The answer
# A gradient goes back along the same wires. Where the forward pass copied, the backward
# pass adds; where it added, it copies; and where it exchanged, it exchanges. Count
# every loss once.
#
# ## Exercises
# In the terminal: `uv run python -m foundation derive all_gather`, then `derive
# expert_parallel`.

# %%
check("19.1", None)

# %%
check("19.2", None)

# %%
check("19.3", None)

# %%
check("19.4", None)

# %%
check("19.5", None)

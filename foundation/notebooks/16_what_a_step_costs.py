# %% [markdown]
# # 16. What does a step cost?
#
# Training takes minutes, or months of a data centre. **Can one know before it runs?**
# Nearly: from two counts. How many multiplications and additions does it
# need (floating-point operations, FLOP)? And how many bytes must pass between memory
# and processor? This chapter counts both, measures the machine that runs it, and holds
# one against the other. Your times will differ from those that are stored here.
#
# The code is `foundation/costs.py`. The project counts in `moe_jax/model/costs.py`.
#
# ## Step 1: 6ND
# A product of $x$, [n, k], and $W$, [k, m], has $nm$ entries, each a sum of $k$
# products: $2nkm$ FLOP. So *each entry of $W$ costs 2 FLOP for each row*, that is, for
# each token. Chapter 2 has the way back, $d_x = d_y W^\top$ and $d_W = x^\top d_y$.
# Both are products of the same size. Forward 2, backward 4:
#
# $$\boxed{\;\text{FLOP of training} = 6\,N D\;}$$
#
# with $N$ entries in all matrices that a token is multiplied with, and $D$ tokens. An
# embedding is looked up, not multiplied, so its table counts only where it is the head
# too. In a mixture of experts, N counts the K *chosen* experts.
#
# What is left out? Norms, activations and the optimizer are linear in their sizes: few
# FLOP (but not few bytes). Scores $q k^\top$ and the mixture $Pv$ are products of two
# *activations*: $2TW$ each, for a token that meets T keys of W numbers in all heads,
# so $12\,LTW$ a token with the backward pass. Against $6N$ with $N \approx 12 L W^2$
# that is $T / 6W$: little, unless the text is long.
#
# The table counts every product of chapter 7's hand-written step as jax traces it, and
# compares. It is not about right, it is equal.

# %%
import time

from foundation import costs, feed_forward
from foundation.lessons.notebook import check, jax, jnp, np, pictures, shown

shown(costs.step_flops)

# %%
for length in (256, 2_048, 16_384):
    matrices, attention = costs.step_flops(12, 768, 2_048, 32_000, 1, length)
    share = attention / (matrices + attention)
    print(f"{length:>6} tokens: {matrices:.2e} FLOP in matrices,", end=" ")
    print(f"and scores are {share:.0%} of all")

# %% [markdown]
# ## Step 2: bytes, and the roof
# A processor has two speeds: its **rate** in FLOP/s and its **bandwidth** in bytes/s.
# It can do both at once, and it is never faster than either:
#
# $$\boxed{\;\text{time} \ge \max\Bigl(\frac{\text{FLOP}}{\text{rate}},\;
# \frac{\text{bytes}}{\text{bandwidth}}\Bigr)\;}$$
#
# The quotient FLOP/bytes is the **intensity** of an operation. Below rate/bandwidth the
# memory is the limit, above it the arithmetic. Drawn over the intensity, the highest
# speed is a slope and then a flat top: the **roofline**.
#
# - The sum of $x$: one FLOP for each number of 4 bytes (float32). Intensity 1/4.
# - A vector times a matrix: 2 FLOP for each entry of 4 bytes. Intensity 1/2. *This is
#   how one token is written*: each weight is read and used once. Hence small weights
#   (chapter 18), and hence batches: B texts at once read each weight once.
# - [n, n] times [n, n]: $2n^3$ FLOP and $12n^2$ bytes: n/6. *This is training.*
#
# Measured, all in float32, the fastest of several runs, since others share a machine:


# %%
def seconds(run, repeats=9):
    """The fastest call, after one that is not counted."""
    run().block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


product = jax.jit(jnp.matmul)
total = jax.jit(jnp.sum)
x, M = numbers(1 << 25), numbers(8_192, 4_096)
found = {"sum of x": (1 / 4, x.size / seconds(lambda: total(x)))}
for batch in (1, 4, 16, 64):
    rows = numbers(batch, 8_192)
    work = 2 * batch * M.size
    moved = 4 * (M.size + rows.size + batch * 4_096)
    speed = work / seconds(lambda rows=rows: product(rows, M))
    found[f"{batch} x matrix"] = (work / moved, speed)
shapes = {f"n = {n}": (n, n, n) for n in (512, 1_024, 2_048)}
shapes["as in step 4"] = (1_024, 512, 1_536)
for name, (n, k, m) in shapes.items():
    A, B = numbers(n, k), numbers(k, m)
    work, moved = 2 * n * k * m, 4 * (n * k + k * m + n * m)
    found[name] = (work / moved, work / seconds(lambda A=A, B=B: product(A, B)))
rate = max(speed for _, speed in found.values())
bandwidth = max(speed / intensity for intensity, speed in found.values())
print(f"{rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s", end=", ")
print(f"as fast as each other at {rate / bandwidth:.0f} FLOP a byte")
for name, (intensity, speed) in found.items():
    most = intensity / costs.least_time(intensity, 1, rate, bandwidth)
    print(f"{name:<12} {intensity:8.2f} FLOP/byte {speed / 1e9:8.1f} GFLOP/s", end=" ")
    print(f"{speed / most:5.0%} of the roof")
places = np.array([0.1, rate / bandwidth, 400])
roof = [i / costs.least_time(i, 1, rate, bandwidth) for i in places]
measured = tuple(zip(*found.values(), strict=True))
pictures.curves(
    {"roofline": {"roof": (places, roof), "measured": measured}},
    xlabel="FLOP for each byte",
    ylabel="FLOP/s",
    log=True,
    log_x=10,
    markers=True,
)

# %% [markdown]
# ## Step 3: why tiles are fast
# The intensity n/6 is a promise. It holds only if each number is read *once*, and a
# processor's own fast memory holds a few. Take $C = AB$ as $n$ steps, each with one
# column of A and one row of B. It is the same arithmetic. But each step reads and
# writes the whole of C: $2n^2$ numbers for $2n^2$ FLOP, so the memory is the limit.
# With $b$ columns at once there are $n/b$ steps, and C passes $n/b$ times:
#
# $$\text{numbers moved} = 2n^2 + \frac{n}{b}\,2n^2.$$
#
# Intensity grows with $b$. That is all that a **tile** is: work that is large enough to
# use what has been read. A good program cuts all three axes, so that parts of A, B and
# C fit into the fast memory together. Chapter 11 is the same idea for attention: the
# scores of a tile are used before they are forgotten.
#
# The cell multiplies in steps of $b$.

# %%
shown(costs.steps_traffic, costs.least_time)

# %%
n = 1_024
A, B = numbers(n, n), numbers(n, n)
one_step = jax.jit(lambda C, columns, rows: C + columns @ rows, donate_argnums=0)


def in_steps(block):
    C = jnp.zeros((n, n), jnp.float32)
    for k in range(0, n, block):
        C = one_step(C, A[:, k : k + block], B[k : k + block])
    return C


blocks = (1, 4, 16, 64, 256, 1_024)
took = [seconds(lambda b=b: in_steps(b), 3) for b in blocks]
least = []
for b in blocks:
    moved = 4 * costs.steps_traffic(n, b)
    least.append(costs.least_time(2 * n**3, moved, rate, bandwidth))
pictures.curves(
    {"one product, in steps": {"measured": (blocks, took), "roof": (blocks, least)}},
    xlabel="columns in a step",
    ylabel="seconds",
    log=True,
    log_x=2,
    markers=True,
)
for b, seen, bound in zip(blocks, took, least, strict=True):
    print(f"steps of {b:>5}: {1e3 * seen:7.1f} ms, from the roof {1e3 * bound:7.1f} ms")
assert jnp.max(jnp.abs(in_steps(64) - A @ B)) < 1e-2

# %% [markdown]
# C has 4 MiB. Where that fits into the processor's cache, its traffic does not reach
# the memory, and the measured time can be below this roof.
#
# ## Step 4: a backward pass costs two forward passes
# Now the hand-written network of chapter 7, in float32, forward and back.

# %%
T, D, F = 1_024, 512, 1_536
weights = [numbers(*shape) for shape in ((D, F), (D, F), (F, D))]
x, d_y = numbers(T, D), numbers(T, D)
there, back = feed_forward.feed_forward_forward, feed_forward.feed_forward_backward
forward = jax.jit(lambda x, *w: there(x, *w)[0])
both = jax.jit(lambda x, d_y, *w: back(d_y, there(x, *w)[1]))
one = seconds(lambda: forward(x, *weights))
whole = seconds(lambda: both(x, d_y, *weights)[0])
flops = 6 * 3 * D * F * T
print(f"forward {1e3 * one:.1f} ms, with backward {1e3 * whole:.1f} ms:", end=" ")
print(f"{whole / one:.1f} times as long, and three by the count")
speed = flops / whole
print(f"{speed / 1e9:.0f} GFLOP/s, {speed / rate:.0%} of the fastest product above")

# %% [markdown]
# ## Step 5: what does it buy?
# Losses of many models lie near a **power law** in the FLOP of training, $L = a
# C^{-b}$: a straight line if both axes are logarithmic. The project has trained a
# mixture of experts and its dense twin (as many active parameters) at five budgets, one
# seed each, a factor of $\sqrt{10}$ apart. The losses are in bits per byte of the same
# text, from `benchmarks/quality.md`. The line is the least-squares line in the
# logarithms: $b = -\sum_i \tilde x_i y_i / \sum_i \tilde x_i^2$, with $\tilde x = \log
# C$ minus its mean, and $y = \log L$.

# %%
shown(costs.power_law)

# %%
budgets = [2e12 * 10 ** (k / 2) for k in range(5)]
losses = {
    "mixture": [1.5907, 1.3334, 1.0000, 0.8025, 0.7326],
    "dense": [1.5892, 1.3316, 1.0134, 0.8162, 0.7496],
}
lines = {}
for name, points in losses.items():
    a, b = costs.power_law(budgets, points)
    left = np.log(points) - np.log(a * np.array(budgets) ** -b)
    print(f"{name:<8} b = {b:.3f}, points off the line by", end=" ")
    print(*(f"{100 * off:+.1f} %" for off in left))
    lines[name] = (budgets, points)
    lines[f"{name}: line"] = (budgets, a * np.array(budgets) ** -b)
pictures.curves(
    {"the loss of both models": lines},
    "FLOP of training",
    "bits per byte",
    log=True,
    log_x=10,
    markers=True,
)
for name, points in losses.items():
    for floor in (0.0, 0.3, 0.5):
        a, b = costs.power_law(budgets, points, floor)
        print(f"{name:<8} floor {floor}: at 1e16 FLOP {floor + a * 1e16**-b:.2f}")

# %% [markdown]
# Read the last lines before you believe a line. Text has a floor: some of it cannot be
# guessed. Five points over two decades cannot say where it is, and what a fit predicts
# fifty times further on is mostly the floor that was put in. The points are not on the
# line either: the third and the fourth are 4 to 6 % below it, the others above. What
# the runs do show is that the mixture gains from the third budget on, and more with
# each.
#
# ## The answer
# $6ND$ FLOP, and at least FLOP/rate seconds, if every product is large enough to be
# above the roofline's corner. Where it is not, count bytes.
#
# ## Exercises

# %%
check("16.1", None)

# %%
check("16.2", None)

# %%
check("16.3", None)

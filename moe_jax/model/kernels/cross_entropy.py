"""Cross-entropy, one block of tokens after another, so that the whole array of logits `[N, V]` never exists.

Blocks are large, because each one reads and writes the gradient of the whole head. The platform decides their `Form`.

    CPU    exp(z - max z) is computed once, for logsumexp(z) and softmax(z)
    GPU    the head is padded once to a multiple of 128 columns, because the products of a GPU need aligned rows: an odd
           vocabulary (GPT-2's 50,257) would be padded in every block. logsumexp(z) reads z once, and softmax(z) is
           exp(z - logsumexp(z))
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.matmul import transposed_product
from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.precision import at_least_float32, dot_precision
from moe_jax.model.quantized import QuantizedMatrix, as_array

LOGITS_BYTES = 128 * 2**20
"""Most bytes of the float32 logits of one block: 667 tokens of GPT-2's vocabulary."""


class Form(NamedTuple):
    """How a block of tokens is computed."""

    columns: int
    """The head is padded with zeros to a multiple of so many columns. Their logits are -inf."""
    one_pass: bool
    """logsumexp(z) is one reduction (`_logsumexp_in_one_pass`). Otherwise the maximum is taken first."""


CPU_FORM = Form(1, one_pass=False)
GPU_FORM = Form(128, one_pass=True)


def token_losses(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """-log softmax(logits)[target], in nats."""
    return jax.nn.logsumexp(logits, axis=-1) - _at_targets(logits, targets)


def _at_targets(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _logsumexp_and_softmax(z: Float[Array, "N V"], form: Form) -> tuple[Float[Array, " N"], Float[Array, "N V"]]:
    """(logsumexp(z), softmax(z))."""
    if form.one_pass:
        logsumexp = _logsumexp_in_one_pass(z)
        return logsumexp, jnp.exp(z - logsumexp[:, None])
    most = z.max(axis=-1, keepdims=True)
    powers = jnp.exp(z - most)
    total = powers.sum(axis=-1, keepdims=True)
    return (most + jnp.log(total))[:, 0], powers / total


def _logsumexp_in_one_pass(z: Float[Array, "N V"]) -> Float[Array, " N"]:
    """The same, up to rounding, but z is read once: a reduction of pairs (m, s) that stand for s e^m, with
    s e^m + s' e^m' = (s e^(m - n) + s' e^(m' - n)) e^n and n = max(m, m') (Milakov and Gimelshein 2018, section 3)."""

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        most = jnp.maximum(a[0], b[0])
        return most, a[1] * jnp.exp(a[0] - most) + b[1] * jnp.exp(b[0] - most)

    # The smallest number instead of -inf: -inf - -inf would be NaN for the columns of padding.
    zero = jnp.finfo(z.dtype).min, jnp.zeros((), z.dtype)
    most, total = jax.lax.reduce((z, jnp.ones_like(z)), zero, add, (1,))
    return most + jnp.log(total)


def blocked_token_losses(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"] | QuantizedMatrix, targets: Int[Array, " N"]
) -> Float[Array, " N"]:
    """`token_losses(hidden @ head, targets)`, a block of tokens at a time. For evaluation: it has no gradient."""

    def losses_in(form: Form, hidden: Array, head: Array | QuantizedMatrix, targets: Array) -> Array:
        weight = _padded_head(head, hidden.dtype, form)

        def block(inputs: tuple[Array, Array]) -> Array:
            z = _logits(inputs[0], weight, head.shape[1])
            return _logsumexp_and_softmax(z, form)[0] - _at_targets(z, inputs[1])

        blocks, rows = token_blocks(hidden.shape[0], weight.shape[1])
        losses = jax.lax.map(block, (_in_blocks(hidden, blocks, rows), _in_blocks(targets, blocks, rows)))
        return losses.reshape(-1)[: hidden.shape[0]]

    return _by_platform(losses_in, hidden, head, targets)


def _by_platform(function: Callable[..., Any], *operands: Any) -> Any:
    """function(form, *operands), in the form for the platform that the program is compiled for."""
    return by_platform(*operands, cpu=partial(function, CPU_FORM), default=partial(function, GPU_FORM))


def _padded_head(head: Float[Array, "D V"] | QuantizedMatrix, dtype: jnp.dtype, form: Form) -> Float[Array, "D _"]:
    """The head in the dtype of the product, with zeros up to a multiple of `form.columns`."""
    missing = -head.shape[1] % form.columns
    narrow = as_array(head, dtype)
    return jnp.pad(narrow, ((0, 0), (0, missing))) if missing else narrow


def _logits(hidden: Float[Array, "N D"], weight: Float[Array, "D P"], vocabulary: int) -> Float[Array, "N P"]:
    """hidden @ weight in at least float32, for operands of one dtype. Columns from `vocabulary` on are -inf."""
    wide = at_least_float32(hidden.dtype)
    z = jnp.matmul(hidden, weight, precision=dot_precision(hidden.dtype), preferred_element_type=wide)
    return z if weight.shape[1] == vocabulary else jnp.where(jnp.arange(weight.shape[1]) < vocabulary, z, -jnp.inf)


def token_blocks(tokens: int, columns: int) -> tuple[int, int]:
    """(number of blocks, tokens of a block): the fewest blocks whose logits take at most LOGITS_BYTES, of equal size.

    Equal blocks without padding are taken if they are at most twice as many as needed. Else (a prime number of tokens
    would give blocks of one token) the last block is padded.
    """
    most = max(LOGITS_BYTES // (4 * columns), 1)
    needed = -(-tokens // most)
    for blocks in range(needed, min(2 * needed, tokens) + 1):
        if tokens % blocks == 0:
            return blocks, tokens // blocks
    rows = -(-tokens // needed)
    return -(-tokens // rows), rows


def _in_blocks(x: Array, blocks: int, rows: int) -> Array:
    """x `[N, ...]` as `[blocks, rows, ...]`, with zeros at the end of the last block."""
    padding = blocks * rows - x.shape[0]
    x = jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) if padding else x
    return x.reshape(blocks, rows, *x.shape[1:])


@jax.custom_vjp
def mean_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    loss_scale: Float[Array, ""] | None = None,
    weights: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """Mean of `token_losses(hidden @ head, targets)`. With `weights`, the sum of the losses times their weights: a
    token of weight 0 changes no bit of the result, and its gradients are exactly 0.

    `loss_scale` is the factor by which the caller multiplies the loss that this function returns. The function does not
    multiply the loss itself. It needs the factor for its gradients in float16.

    With L = mean_n(logsumexp(z_n) - z_n[target]) and z = hidden head:

        dL/dz = (softmax(z) - onehot(target)) / N,   d_hidden = dL/dz head^T,   d_head = hidden^T dL/dz

    The loss is a scalar, so the forward pass knows d_hidden and d_head up to one factor: the incoming gradient of the
    loss, divided by N. The forward pass computes them block by block, while it has the logits z of the block. The
    backward pass only multiplies by the factor. No logits are kept.

    With a loss scale s, the incoming gradient will be s, and the forward pass multiplies softmax - onehot by s / N in
    float32, before it is rounded to float16. Rounded first, a probability below 6e-8 / 2 would become 0, and no scale
    could bring it back. The backward pass then multiplies by (incoming gradient / s), which is 1.

    With weights w, the weight w_n takes the place of 1 / N.
    """
    losses = blocked_token_losses(hidden, head, targets)
    return losses.mean() if weights is None else (losses * weights.astype(losses.dtype)).sum()


def _with_gradients(
    form: Form,
    hidden: Array,
    head: Array,
    targets: Array,
    loss_scale: Array | None,
    weights: Array | None,
) -> tuple[Array, Array, Array]:
    """The loss, d_hidden and d_head, as `mean_cross_entropy` says."""
    count, vocabulary = hidden.shape[0], head.shape[1]
    wide = at_least_float32(hidden.dtype)
    weight = _padded_head(head, hidden.dtype, form)
    blocks, rows = token_blocks(count, weight.shape[1])
    # The weight of each token, only if there is padding: 1, or 0 for a row of padding. The gradients need no weight: a
    # row of padding is zero, so it adds nothing to d_head, and its own gradient is cut off.
    token_weight = None if blocks * rows == count else _in_blocks(jnp.ones(count, wide), blocks, rows)
    if weights is not None:
        token_weight = _in_blocks(weights.astype(wide), blocks, rows)

    def block(d_head: Array, inputs: tuple[Array, Array, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        h, target, token_weight = inputs
        z = _logits(h, weight, vocabulary)
        logsumexp, softmax = _logsumexp_and_softmax(z, form)
        losses = logsumexp - _at_targets(z, target)
        loss = losses.sum() if token_weight is None else (losses * token_weight).sum()
        # softmax - onehot(target), without an array of zeros and ones.
        d_z = jnp.where(jnp.arange(z.shape[1]) == target[:, None], softmax - 1, softmax)
        if weights is not None and token_weight is not None:
            d_z = d_z * (token_weight if loss_scale is None else token_weight * loss_scale.astype(wide))[:, None]
        elif loss_scale is not None:
            d_z = d_z * (loss_scale.astype(wide) / count)
        d_z = d_z.astype(h.dtype)
        d_head = d_head + transposed_product(h, d_z)
        return d_head, (loss, jnp.einsum("nv,dv->nd", d_z, weight, precision=dot_precision(h.dtype)))

    d_head = jnp.zeros(weight.shape, wide)
    inputs = (_in_blocks(hidden, blocks, rows), _in_blocks(targets, blocks, rows), token_weight)
    if blocks == 1:
        d_head, (losses, d_hidden) = block(d_head, jax.tree.map(lambda x: x[0], inputs))
    else:
        d_head, (losses, d_hidden) = jax.lax.scan(block, d_head, inputs)
    total = losses.sum() if weights is not None else losses.sum() / count
    return total, d_hidden.reshape(-1, hidden.shape[1])[:count], d_head[:, :vocabulary]


def _forward(
    hidden: Array, head: Array, targets: Array, loss_scale: Array | None, weights: Array | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    loss, d_hidden, d_head = _by_platform(_with_gradients, hidden, head, targets, loss_scale, weights)
    plain = 1 / hidden.shape[0] if weights is None else 1.0
    share = jnp.asarray(plain, loss.dtype) if loss_scale is None else 1 / loss_scale.astype(loss.dtype)
    return loss, (d_hidden, d_head.astype(head.dtype), share)


def _backward(residuals: tuple[Array, Array, Array], d_loss: Array) -> tuple[Array, Array, None, None, None]:
    d_hidden, d_head, share = residuals
    scale = d_loss * share
    return (d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None, None)


mean_cross_entropy.defvjp(_forward, _backward)

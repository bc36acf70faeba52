"""Collectives and their adjoints. Derived in chapter 19.

A device is an index: an array [R, ...] holds what each of R devices has. Every collective is linear, so its adjoint is
the transposed matrix: who sent, receives.

    forward                                          backward
    copy_to_all     y_r = x                          d_x = sum_r d_y_r                 a sum
    all_reduce      y_r = sum_s x_s                  d_x_s = sum_r d_y_r               all_reduce
    all_gather      y_r = (x_0, ..., x_(R-1))        d_x_s = sum_r part s of d_y_r     reduce_scatter
    reduce_scatter  y_r = sum_s part r of x_s        d_x_s = (d_y_0, ..., d_y_(R-1))   all_gather
    all_to_all      part s of y_r = part r of x_s    the same with r and s exchanged   all_to_all

Tensor parallelism cuts a network's hidden columns into parts: x goes to all ranks (Megatron's f), and their outputs are
added up (g). Fully sharded data parallelism (FSDP) cuts every weight into parts, gathers it for a layer, forgets it,
and scatters the summed gradient. Expert parallelism is two all_to_alls around the experts, rank e with expert e.

Sources: Shoeybi et al. 2019, section 3 (f and g); Rajbhandari et al. 2020, section 5.3 (weights in parts); Patarasuk
and Yuan 2009, section 3 (the ring); Lepikhin et al. 2020, section 3.2 (all_to_all around experts); the factor in the
field: jax #3970.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from foundation.activations import tanh_backward, tanh_forward


def copy_to_all_forward(x: Float[Array, "..."], ranks: int) -> tuple[Float[Array, "R ..."], None]:
    """Every rank gets x."""
    return jnp.broadcast_to(x, (ranks, *x.shape)), None


def copy_to_all_backward(d_y: Float[Array, "R ..."], cache: None) -> Float[Array, "..."]:
    """x was used on every rank: its gradients are added up."""
    return jnp.sum(d_y, axis=0)


def all_reduce_forward(x: Float[Array, "R N"]) -> tuple[Float[Array, "R N"], None]:
    """Every rank gets the sum over ranks."""
    return jnp.broadcast_to(jnp.sum(x, axis=0), x.shape), None


def all_reduce_backward(d_y: Float[Array, "R N"], cache: None) -> Float[Array, "R N"]:
    """x_s went into the output of every rank."""
    return all_reduce_forward(d_y)[0]


def all_gather_forward(x: Float[Array, "R N"]) -> tuple[Float[Array, "R RN"], None]:
    """Every rank gets the parts of all ranks, in the order of the ranks."""
    return jnp.broadcast_to(x.reshape(-1), (len(x), x.size)), None


def all_gather_backward(d_y: Float[Array, "R RN"], cache: None) -> Float[Array, "R N"]:
    """Part s of every rank's gradient goes to rank s, and is added up there."""
    return reduce_scatter_forward(d_y)[0]


def reduce_scatter_forward(x: Float[Array, "R RN"]) -> tuple[Float[Array, "R N"], None]:
    """Rank r gets the sum over ranks of their part r."""
    ranks = len(x)
    return jnp.sum(x, axis=0).reshape(ranks, -1), None


def reduce_scatter_backward(d_y: Float[Array, "R N"], cache: None) -> Float[Array, "R RN"]:
    """Part r of every x_s went to rank r: every rank gets the gradients of all ranks."""
    return all_gather_forward(d_y)[0]


def all_to_all_forward(x: Float[Array, "R R ..."]) -> tuple[Float[Array, "R R ..."], None]:
    """Rank r gives its part s to rank s, which keeps it as its part r."""
    return jnp.swapaxes(x, 0, 1), None


def all_to_all_backward(d_y: Float[Array, "R R ..."], cache: None) -> Float[Array, "R R ..."]:
    """Each gradient goes back to the rank from which its part came."""
    return all_to_all_forward(d_y)[0]


def ring_all_reduce(x: Float[Array, "R RN"]) -> tuple[Float[Array, "R RN"], int]:
    """(the sum on every rank, numbers that each rank has sent), with messages to the next rank alone.

    In the first R - 1 steps a part grows by one rank's share with each message. Then rank r has the whole part r + 1.
    In the last R - 1 steps the whole parts go round.
    """
    ranks, sent = len(x), 0
    parts = x.reshape(ranks, ranks, -1)
    me = jnp.arange(ranks)
    for step in range(2 * (ranks - 1)):
        part = (me - step) % ranks  # of the message that rank `me` sends
        arriving = jnp.roll(parts[me, part], 1, axis=0)
        place = (me - 1 - step) % ranks
        have = parts[me, place] if step < ranks - 1 else 0.0
        parts = parts.at[me, place].set(have + arriving)
        sent += arriving[0].size
    return parts.reshape(x.shape), sent


def tensor_parallel_forward(
    x: Float[Array, "T D"], w_in: Float[Array, "R D F"], w_out: Float[Array, "R F D"]
) -> tuple[Float[Array, "T D"], tuple]:
    """tanh(x W_in) W_out: rank r has its own columns of W_in, and the rows of W_out that belong to them."""
    copies, _ = copy_to_all_forward(x, len(w_in))  # f
    h, slopes = tanh_forward(jnp.einsum("rtd,rdf->rtf", copies, w_in))
    y = jnp.sum(jnp.einsum("rtf,rfd->rtd", h, w_out), axis=0)  # g
    return y, (x, w_in, w_out, h, slopes)


def tensor_parallel_backward(d_y: Float[Array, "T D"], cache: tuple) -> tuple[Array, Array, Array]:
    """(d_x, d_w_in, d_w_out): g copies on its way back, and f adds up. Gradients of weights are not sent."""
    x, w_in, w_out, h, slopes = cache
    d_parts, _ = copy_to_all_forward(d_y, len(w_in))
    d_w_out = jnp.einsum("rtf,rtd->rfd", h, d_parts)
    d_a = tanh_backward(jnp.einsum("rtd,rfd->rtf", d_parts, w_out), slopes)
    d_copies = jnp.einsum("rtf,rdf->rtd", d_a, w_in)
    return copy_to_all_backward(d_copies, None), jnp.einsum("td,rtf->rdf", x, d_a), d_w_out


def sharded_forward(x: Float[Array, "R T I"], shards: Float[Array, "R N"]) -> tuple[Float[Array, "R T O"], tuple]:
    """y_r = x_r W on every rank's own rows. W, [I, O], lies in R parts, and is gathered for this product alone."""
    whole, _ = all_gather_forward(shards)
    return x @ whole.reshape(len(x), x.shape[-1], -1), (x, shards)


def sharded_backward(d_y: Float[Array, "R T O"], cache: tuple) -> tuple[Array, Float[Array, "R N"]]:
    """(d_x, d_shards): W is gathered once more. Its gradient is summed over the ranks, a part of it on each."""
    x, shards = cache
    whole, _ = all_gather_forward(shards)
    d_x = d_y @ jnp.swapaxes(whole.reshape(len(x), x.shape[-1], -1), 1, 2)
    d_whole = jnp.swapaxes(x, 1, 2) @ d_y
    return d_x, all_gather_backward(d_whole.reshape(len(x), -1), None)


def expert_parallel_forward(
    x: Float[Array, "R T D"], gate: Float[Array, "R T"], weights: Float[Array, "R D D"], place: Bool[Array, "R T R C"]
) -> tuple[Float[Array, "R T D"], tuple]:
    """Each token's gate times the answer of its expert, W_e x. Rank e has expert e.

    place[r, t, e, c]: token t of rank r has slot c of the C that expert e keeps for rank r. A token without a slot
    gets 0.
    """
    at = place.astype(x.dtype)
    rows, _ = all_to_all_forward(jnp.einsum("rtec,rtd->recd", at, x))  # at the experts: [E, R, C, D]
    answers = jnp.einsum("ercd,edf->ercf", rows, weights)
    results, _ = all_to_all_forward(answers)  # at home: [R, E, C, D]
    y = gate[..., None] * jnp.einsum("rtec,recd->rtd", at, results)
    return y, (at, gate, weights, rows, results)


def expert_parallel_backward(d_y: Float[Array, "R T D"], cache: tuple) -> tuple[Array, Array, Array]:
    """(d_x, d_gate, d_weights): two all_to_alls again. No sum over ranks is sent."""
    at, gate, weights, rows, results = cache
    d_gate = jnp.einsum("rtd,rtec,recd->rt", d_y, at, results)
    d_results = jnp.einsum("rtec,rtd->recd", at, gate[..., None] * d_y)
    d_answers = all_to_all_backward(d_results, None)  # at the experts
    d_weights = jnp.einsum("ercd,ercf->edf", rows, d_answers)
    d_rows = all_to_all_backward(jnp.einsum("ercf,edf->ercd", d_answers, weights), None)  # at home
    return jnp.einsum("rtec,recd->rtd", at, d_rows), d_gate, d_weights

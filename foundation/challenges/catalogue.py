"""What can be derived: for each operation its module, and hints, the last of which is nearly the answer.

The standard library alone, so that a wrong name is answered at once.
"""

import inspect
from dataclasses import dataclass
from types import FunctionType

from foundation.challenges.planting import function_at


class Unusable(Exception):
    """A learner's file, function or answer that cannot be used. The message says why."""


@dataclass(frozen=True)
class Challenge:
    """One backward pass to derive."""

    module: str
    """File of foundation that holds both functions."""
    name: str
    """NAME_forward is given, NAME_backward is to be written."""
    hints: tuple[str, ...]

    @property
    def backward(self) -> str:
        """Name of the function to write."""
        return f"{self.name}_backward"

    @property
    def functions(self) -> tuple[FunctionType, FunctionType]:
        """Both functions. Their module is loaded, and jax with it."""
        return function_at(f"{self.module}.{self.name}_forward"), function_at(f"{self.module}.{self.backward}")

    def unpacking(self) -> list[str]:
        """The lines of the backward pass that take the cache apart: they are given."""
        lines = map(str.strip, inspect.getsource(self.functions[1]).splitlines())
        return [line for line in lines if line.endswith("= cache")]


_HINTS = """\
activations.tanh
    y_i depends on x_i alone, so d_x = d_y times the slope, entry by entry.
    tanh = sinh / cosh. The quotient rule gives 1 - tanh^2.
    d_y (1 - y^2).

activations.sigmoid
    y_i depends on x_i alone, so d_x = d_y times the slope, entry by entry.
    Write y = 1 / (1 + e^-x) and look for y (1 - y).
    d_y y (1 - y).

activations.relu
    y_i depends on x_i alone, so d_x = d_y times the slope, entry by entry.
    The slope is 1 or 0, and the cache says where.
    jnp.where(positive, d_y, 0.0).

activations.gelu_exact
    y_i depends on x_i alone, so d_x = d_y times the slope, entry by entry.
    A product of two functions of x, so two terms: Phi(x), and x times Phi'(x).
    Phi' is the normal density, exp(-x^2 / 2) / sqrt(2 pi).

activations.gelu
    y_i depends on x_i alone, so d_x = d_y times the slope, entry by entry.
    A product of x and (1 + t) / 2, so two terms. t = tanh(u), and u is a cubic in x.
    (1 + t) / 2 + x / 2 (1 - t^2) u', with u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2).

activations.silu
    y_i depends on x_i alone, so d_x = d_y times the slope, entry by entry.
    A product of x and s, so two terms; s' = s (1 - s).
    d_y s (1 + x (1 - s)).

linear.linear
    Write one entry: y_ro = sum_i x_ri W_io + b_o. Which entries of y does W_io enter?
    d_x = d_y W^T and d_W = x^T d_y: the shapes leave no other choice. Flatten leading axes to rows first.
    d_b is the sum of d_y over all rows, and None without a bias. Nothing is divided by the number of rows.

dropout.dropout
    For a given mask y is linear in x, entry by entry. What is each entry multiplied by?
    1 / (1 - rate) where kept, 0 elsewhere; and 1 where there is no mask (keep is None).
    jnp.where(keep, d_y / (1 - rate), 0.0).

softmax.softmax
    Differentiate the quotient: dp_i / dz_j = p_i ([i = j] - p_j).
    Sum over i with d_p_i in front. Two terms come out, and the second is one number for the whole row.
    p (d_p - sum(p d_p)), the sum over the last axis, kept as an axis.

softmax.logsumexp
    l = log S with S = sum_j exp(z_j): the chain rule through log, then through the sum.
    dl / dz_i = exp(z_i) / S, and that is in the cache.
    d_l has one axis fewer than p: d_l[..., None] * p.

losses.mse
    The mean of n squares: each has slope 2 error, and the mean has 1 / n.
    The error is prediction - target, so the target gets the same with the other sign.
    (d_loss 2 error / n, and its negative).

losses.cross_entropy
    L = logsumexp(z) - z_target. The first part has gradient p, the second one entry.
    p - onehot(target), times d_loss / count, and exactly 0 where a position is not counted.
    d_row = jnp.where(counted, d_loss / count, 0.0); logsumexp_backward(d_row, ...) gives the p.

norms.layernorm
    y = n scale + bias, row by row. So d_n = d_y scale, and d_scale sums d_y n over the rows.
    rstd is a function of every x_j of the row, and so is the mean: two terms leave the gradient.
    d_x = rstd (d_n - mean(d_n) - n mean(d_n n)). d_bias is the sum of d_y over rows, None without bias.

norms.rmsnorm
    y = n scale. So d_n = d_y scale, and d_scale sums d_y n over the rows.
    r = (mean(x^2) + eps)^(-1/2) has dr/dx_j = -r^3 x_j / D. Where does r occur in n?
    d_x = r (d_n - n mean(d_n n)).

embedding.embedding
    Row v of the table is copied to every position whose token is v. What is copied collects a sum.
    Start from zeros of the table's shape, and add each position's gradient to the row it read.
    zeros.at[tokens].add(d_x): with .set the last one would win.

embedding.tied_head
    logits = x W^T. Write one entry: logit_rv = sum_d x_rd W_vd.
    d_x = d_logits W. d_W has the shape [V, D]; which product of d_logits and x has it?
    Flatten leading axes to rows; d_W = d_logits^T x.

positions.learned_positions
    A sum passes its gradient on to both terms. But one row of the table serves every sequence of the batch.
    The table's used rows get d_y summed over the batch; the rows that were not used get 0.
    zeros.at[:T].set(sum of d_y over axis 0), zeros of shape [longest, D].

positions.rope
    Each pair is multiplied by a rotation matrix. d_x = R^T d_y. What is the transpose of a rotation?
    The rotation by the angle with the other sign.
    first cos + second sin, and second cos - first sin, for the halves of d_y.

grouped_heads.share_heads
    Each key head was copied to the heads of its group. The adjoint of copying is a sum.
    Heads of one group are neighbours: [B, H, T, A] is [B, KV, H / KV, T, A].
    Reshape so, and sum over axis 2.

grouped_heads.normalise_heads
    A reshape, and RMSNorm on rows of the scale's length. The cache is RMSNorm's.
    Bring d_y into the shape of n, use RMSNorm's rule, and bring d_x back.
    d_scale sums over every axis but the last.

attention.attention
    From the end: o = kept v gives d_kept = d_o v^T and d_v = kept^T d_o.
    Then dropout backward, then softmax backward. softmax_backward and dropout_backward are given.
    S = q k^T / sqrt(A): d_q = d_S k / sqrt(A), d_k = d_S^T q / sqrt(A). The mask needs no line.

feed_forward.feed_forward
    Four steps backwards. linear_backward and silu_backward are given.
    h = opened u: opened gets d_h u (then silu backward), u gets d_h opened.
    x went into two products, so d_x is the sum of what comes back through both.

router.router
    Three gradients meet at the logits and add there: gates, balance loss, z-loss. Then linear_backward.
    Gates, K > 1: softmax_backward on the chosen logits, scattered to their places. K = 1: d_p at the chosen.
    Balance: d_p = d_balance E f / (B T), then softmax_backward. z: d_z 2 log_total / (B T), logsumexp.

experts.gelu_experts
    One expert is x W_in, gelu, h W_out: the affine layer's rule twice. e is on both sides of each einsum.
    d_hidden = einsum("becd,efd->becf", d_y, w_out), then gelu_backward.
    A weight's gradient sums over b and c, all slots of its expert.

experts.swiglu_experts
    hidden = opened u, a product: opened gets d_hidden u, and u gets d_hidden opened.
    opened = silu(x W_gate), so silu_backward(d_hidden u, its cache).
    x is used twice: d_x is a sum of two einsums.

moe.dispatch
    Forward, each kept token was copied into its slots. What is copied collects a sum.
    _read_slots(d_u, slot) gives what lies in each choice's slot, and 0 for a dropped choice.
    Sum it over the K choices, axis 2.

moe.combine
    y_t = sum_k g_tk h_slot(t,k): a product, so each factor gets d_y times the other.
    d_gates is the inner product of d_y and picked, over D. picked is 0 where dropped.
    d_h: scatter gates d_y into [B, E C + 1, D] along slot, and throw the last slot, nowhere, away.

adafactor.divergence
    w = r c^T: w_ij depends on r_i and c_j. Of v log(v / w) - v + w, only -v log w + w depends on w.
    dD/dr_i = sum_j (c_j - v_ij / r_i).
    sum(c) - (row sums of v) / r, and sum(r) - (column sums of v) / c.

flash_attention.flash_attention
    The gradients are those of attention; only P is computed again, tile by tile: e^(scores - logsumexp).
    softmax_backward needs the row sum of d_P P. It equals the row sum of d_o o, so it is known at once.
    d_q adds over tiles; d_k and d_v are put together. tile_scores gives the scores of a tile.

micro_batches.accumulated_loss
    cross_entropy_backward gives the gradient of one micro-batch's own mean.
    The loss is the sum of share times mean. So each mean gets the cotangent d_loss times its share.
    Put the gradients together along axis 0.

micro_batches.grouped_balance
    f counts choices, so it is a constant. P of a group is a mean over the sequences and tokens of the group.
    E / G in front, 1 / (tokens of a group) from the mean: E f / (B T) in all.
    Each of the B / G sequences of a group gets the f of its group; every token of it the same.

upcycling.upcycled
    The layer's backward pass is moe_backward(d_y, d_balance, d_z, cache); both losses have the cotangent 0.
    It gives d_x and a dict with the gradients of the router and of the E copies of each matrix.
    The router's gradient is a result; the copies' go through copy_experts_backward. Order: d_x, d_dense, d_router.

low_rank.low_rank
    Two linear maps in a row: u = x A, and u B times the scale. linear_backward is given; use it twice.
    The second map gets scale d_y. It gives d_u and d_b. The first one gets d_u.
    d_x has two ways: d_y kernel^T, and what comes back through A.

balancing.sigmoid_router
    g_e = scale s_e / S with S the sum of the chosen scores. So dg_e/ds_j = scale ([e = j] - s_e / S) / S.
    s_e depends on z_e alone, with the slope s_e (1 - s_e). In the cache gates are s / S, without the scale.
    d_z = scale gates (1 - scores) (d_gates - sum(gates d_gates)). gates is 0 where nothing was chosen.

small_weights.coded_product
    y_o = s_o u_o with u = x @ codes. Both x and the scales have a gradient; codes have none.
    d_u = d_y * scale, so d_x = d_u @ codes.T.
    d_scale_o is the sum over tokens of d_y_to u_to: u is in the cache.

collectives.all_gather
    Part s of every rank's output came from rank s. How many copies of x_s are there?
    d_x_s is the sum over ranks r of part s of d_y_r. Split the last axis of d_y into parts first.
    jnp.sum(d_y, axis=0).reshape(len(d_y), -1), which is a reduce_scatter.

collectives.expert_parallel
    Walk the forward pass backwards: combine, all_to_all, expert, all_to_all, dispatch.
    d_results = place^T (gate d_y), swap the first two axes, and the experts have d_answers.
    d_weights = rows^T d_answers, where the expert is. d_answers W^T, swapped again, are d_rows at home.

preferences.expected_reward
    dJ/d log pi(y) = pi(y) r(y): J is a sum of exp(log pi) r.
    A baseline changes nothing in the end, because sum_y pi(y) d log pi(y) = 0.
    text_log_probs_backward(d_value * exp(log_pi) * (reward - value), cache of text_log_probs).

preferences.dpo
    L = log(1 + exp(-m)), so dL/dm = -sigmoid(-m) = -1 / (1 + exp(m)).
    dm/d chosen = beta and dm/d rejected = -beta. The loss is a mean over pairs.
    d_chosen = -d_loss * beta / (1 + exp(margin)) / (number of pairs), and d_rejected its negative.
"""


def _challenge(paragraph: str) -> Challenge:
    place, *hints = paragraph.splitlines()
    module, name = place.split(".")
    return Challenge(module, name, tuple(hint.strip() for hint in hints))


CHALLENGES = {challenge.name: challenge for challenge in map(_challenge, _HINTS.split("\n\n"))}
"""The challenge of each operation."""

"""Makes the optimizer of a run, with its learning-rate schedule: linear warm-up, then a cosine or linear decay.

Bytes of optimizer state for each parameter (a float32 weight takes 4 bytes more, and its gradient another 4):

    adamw        8       both moments in float32
    adamw-bf16   6       first moment in bfloat16
    adamw-8bit   2.06    both moments in 8-bit codes
    adafactor    0.01    no first moment, the second by rows and columns: `adafactor`
    muon         4 to 8  one momentum for the matrices of the blocks, AdamW on the rest

Chapter 10 of `foundation` derives the steps of AdamW, Adafactor and Muon, and a test compares them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moe_jax.config import TrainConfig
from moe_jax.model.transformer import Params
from moe_jax.training.optimizers.adafactor import scale_by_adafactor
from moe_jax.training.optimizers.adam import scale_by_adam, scale_by_adam8bit, skippable
from moe_jax.training.optimizers.muon import scale_by_muon


def warmup_steps(config: TrainConfig) -> int:
    """Steps of the warm-up: `config.warmup_steps`, but at most a tenth of a run whose number of steps is known."""
    return config.warmup_steps if config.minutes else min(config.warmup_steps, config.steps // 10)


def learning_rate(config: TrainConfig, peak: float) -> optax.Schedule:
    """The learning rate of the run's step that follows `n` earlier steps, as a function of n. Skipped steps count.

    Linear warm-up from peak / (warmup + 1) to the peak, then a cosine (Loshchilov and Hutter 2017, equation 5) or a
    straight line. The first step after the warm-up has the peak, the last step (n = steps - 1) `final_lr_ratio * peak`.
    """
    warmup = warmup_steps(config)
    falling = max(config.steps - 1 - warmup, 1)
    if config.lr_schedule == "linear":
        decay = optax.linear_schedule(peak, config.final_lr_ratio * peak, falling)
    else:
        decay = optax.cosine_decay_schedule(peak, falling, alpha=config.final_lr_ratio)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])


type Constrain = Callable[[Any], Any]


def make_optimizer(
    config: TrainConfig, constrain: Constrain = lambda updates: updates, narrow: bool = False, stacked: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the configuration. It expects gradients that are already clipped.

    `update(..., step=n, taken=...)` takes the run's clock n, the number of earlier steps, skipped ones included. The
    optimizer has no clock of its own for the learning rate. Weight decay applies to matrices, not to vectors (norm
    scales, biases). `taken=False` changes no bit of the optimizer's state. The caller must then not add the updates to
    the parameters.

    `constrain` says where the updates lie on a mesh (`parallel.layout.Layout.constrain`). It acts before the decay,
    which adds parameters: these lie elsewhere, and the compiler would take their layout for the whole rule.

    `narrow` and `stacked` are those of `scale_by_muon`.
    """
    decayed = partial(_decayed, config=config, constrain=constrain)
    if config.optimizer == "adafactor":
        return decayed(skippable(scale_by_adafactor()), config.lr)
    if config.optimizer == "adamw-8bit":
        rule = scale_by_adam8bit(config.beta1, config.beta2, config.eps, config.seed)
        return decayed(skippable(rule), config.lr)
    first_moment = jnp.bfloat16 if config.optimizer == "adamw-bf16" else None
    adamw = decayed(scale_by_adam(config.beta1, config.beta2, config.eps, first_moment), config.lr)
    if config.optimizer == "muon":
        labels = partial(muon_labels, routers=config.muon_router)
        return optax.partition(
            {"muon": decayed(scale_by_muon(narrow, stacked), config.muon_lr), "adamw": adamw}, labels
        )
    return adamw


def scale_by_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """-schedule(step) x the update. It keeps no count of steps: a count in the optimizer's state would stand still in a
    skipped step, and the rate would fall behind the run's clock."""

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, *, step: int | Int[Array, ""] | None = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        if step is None:
            raise TypeError("update(..., step=n) is missing: the learning rate follows the run's step")
        rate = -jnp.asarray(schedule(step))
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _decayed(
    rule: optax.GradientTransformationExtraArgs, peak: float, config: TrainConfig, constrain: Constrain
) -> optax.GradientTransformationExtraArgs:
    """An update rule plus decoupled weight decay of matrices (Loshchilov and Hutter 2019, algorithm 2). Both are
    multiplied by the learning rate, whose largest value is `peak`."""
    return optax.chain(
        rule,
        optax.stateless(lambda updates, _: constrain(updates)),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)),
        scale_by_rate(learning_rate(config, peak)),
    )


def muon_labels(params: Params, routers: bool = False) -> Params:
    """ "muon" for the matrices of attention and experts, and with `routers` for the routers. "adamw" for the rest.

    Embedding and head are tables with one vector for each token, and these vectors get separate gradients. A router is
    a table with one column for each expert.
    """

    def label(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        matrix = leaf.ndim >= 2 and name.startswith("blocks.") and (routers or not name.endswith(".router"))
        return "muon" if matrix else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def needs_whole_matrices(params: Params, config: TrainConfig) -> Any:
    """A tree like `params`: true where the update of a matrix needs all its rows and columns on one device. Muon
    multiplies whole matrices, and the blocks of 8-bit moments run across rows. Adafactor's means are small enough to be
    summed over devices."""
    if config.optimizer == "muon":
        return jax.tree.map(lambda label: label == "muon", muon_labels(params, config.muon_router))
    return jax.tree.map(lambda _: config.optimizer == "adamw-8bit", params)

"""AdamW, or Muon on the matrices and AdamW on the rest, with a linear warm-up and a cosine to the end of the run."""

from typing import Any

import jax
import optax
from optax import contrib

from moe_jax.config import TrainConfig
from moe_jax.model.transformer import Params


def warmup_steps(config: TrainConfig) -> int:
    """Steps of warm-up that are taken: no more than a tenth of the run."""
    return min(config.warmup_steps, config.steps // 10)


def learning_rate(config: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up from peak / (warmup + 1) to the peak, then a cosine (Loshchilov and Hutter 2017, equation 5)
    that reaches `final_lr * peak` at the last step."""
    warmup = warmup_steps(config)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1)),
            optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), alpha=config.final_lr),
        ],
        [warmup],
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of the configuration, on gradients clipped to a global norm.

    Matrices decay; vectors (norm scales, biases) do not.
    """
    adamw = optax.adamw(
        learning_rate(config, config.lr),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
    if config.optimizer == "muon":
        rule = optax.partition({"muon": _muon(config), "adamw": adamw}, muon_labels)
    else:
        rule = adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): the momentum of each matrix, made nearly orthogonal by five Newton-Schulz steps.

    A stack of experts `[E, D, F]` is E matrices: orthogonalised as one, the experts would share one spectrum.
    """

    def axes(params: Any) -> Any:
        return jax.tree.map(lambda p: contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)

    return optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=axes),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config, config.muon_lr)),
    )


def muon_labels(params: Params) -> Params:
    """ "muon" for the matrices of attention and experts, "adamw" for the rest.

    Embedding and head are tables of rows, each with a gradient of its own; the router is a table of experts.
    """

    def label(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        matrix = leaf.ndim >= 2 and name.startswith("blocks.") and not name.endswith(".router")
        return "muon" if matrix else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)

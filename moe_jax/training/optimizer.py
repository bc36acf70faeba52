"""AdamW with a linear warm-up and a cosine to the end of the run."""

import jax
import optax

from moe_jax.config import TrainConfig
from moe_jax.model.transformer import Params


def warmup_steps(config: TrainConfig) -> int:
    """Steps of warm-up that are taken: no more than a tenth of the run."""
    return min(config.warmup_steps, config.steps // 10)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from lr / warmup to lr, then a cosine (Loshchilov and Hutter 2017, equation 5) that reaches
    `final_lr * lr` at the last step."""
    warmup = warmup_steps(config)
    return optax.join_schedules(
        [
            optax.linear_schedule(config.lr / (warmup + 1), config.lr, max(warmup, 1)),
            optax.cosine_decay_schedule(config.lr, max(config.steps - warmup, 1), alpha=config.final_lr),
        ],
        [warmup],
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW on gradients clipped to a global norm. Matrices decay; vectors (norm scales, biases) do not."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Params) -> Params:
    return jax.tree.map(lambda p: p.ndim >= 2, params)

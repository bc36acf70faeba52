"""Temporary memory of the training step, with our cross-entropy and with a plain one."""

from moe_jax.config import RunConfig
from moe_jax.model.moe.layer import MoE
from moe_jax.training.programs import Programs


def temporary_bytes(config: RunConfig, batch_size: int, moe: type[MoE] = MoE) -> dict[str, int]:
    """Temporary memory in bytes that the compiler reports for the training step, and for the step with a plain loss.

    The plain loss computes all logits at once, and jax differentiates it.
    """
    ours = Programs.of(config, moe=moe).compiled_step(batch_size)
    plain = Programs.of(config, moe=moe, loss="reference").compiled_step(batch_size)
    return {
        "temp_bytes": ours.memory_analysis().temp_size_in_bytes,
        "temp_bytes_plain_loss": plain.memory_analysis().temp_size_in_bytes,
    }

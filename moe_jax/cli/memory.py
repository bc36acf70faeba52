"""Refuses settings whose training step cannot be in memory, before jax is imported and before anything is written."""

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.model.step_memory import least_step_bytes
from moe_jax.system.environment import (
    GIB,
    LEAST_ADDRESS_SPACE,
    address_space,
    check_limits,
    machine_memory,
    runs_on_cpu,
)


def check_memory(config: RunConfig) -> None:
    """Raise an error if a training step needs more memory than this machine or this process may have.

    Only for a CPU: the memory of a card is planned by `moe-jax plan`.
    """
    check_limits()
    if not runs_on_cpu():
        return
    least, memory, space = least_step_bytes(config), machine_memory(), address_space()
    needs = (
        f"--seq-len {config.model.seq_len}, --batch-size {config.train.batch_size}: a training step needs at least "
        f"{least / GIB:,.1f} GiB"
    )
    cure = "use a smaller --seq-len, --batch-size or model"
    if memory is not None and least > memory:
        raise ConfigError(f"{needs}, and this machine has {memory / GIB:,.1f} GiB; {cure}, or --execution.remat")
    if space is not None and least + LEAST_ADDRESS_SPACE > space:
        raise UserError(
            f"{needs}, JAX itself {LEAST_ADDRESS_SPACE / GIB:.0f} GiB, and ulimit -v {space // 1024} allows "
            f"{space / GIB:,.1f} GiB; raise the limit, or {cure}"
        )

"""A sparse mixture-of-experts language model in JAX. `load_run` opens what `train.py` left."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.training.run import load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    # Late, because it imports jax, and a wrong flag is to be answered before that.
    if name == "load_run":
        from moe_jax.training.run import load_run

        return load_run
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")

"""A sparse mixture-of-experts language model in JAX.

    run = moe_jax.load_run("runs/nano")          a trained model: generate, logits, evaluate, trace, switch_off
    layer = moe_jax.MoE(64, 128, experts=8, rngs=nnx.Rngs(0))     the layer, for a Flax model of your own

`docs/library.md` has all public names, and recipes. The programs are `train.py`, `benchmark.py` and
`moe-jax COMMAND`.
"""

TYPE_CHECKING = False  # type checkers know the name. Before `__main__` runs, Ctrl-C in an import prints a traceback
if TYPE_CHECKING:
    from moe_jax.api import Run, load_run
    from moe_jax.config import ModelConfig, RoutingConfig, UserError
    from moe_jax.inference.sampling import Sampling
    from moe_jax.model.moe.layer import Mode, MoE, RouterStats

__all__ = ["MoE", "Mode", "ModelConfig", "RouterStats", "RoutingConfig", "Run", "Sampling", "UserError", "load_run"]

_LAZY_IMPORTS = {
    "MoE": "moe_jax.model.moe.layer",
    "Mode": "moe_jax.model.moe.layer",
    "ModelConfig": "moe_jax.config",
    "RouterStats": "moe_jax.model.moe.layer",
    "RoutingConfig": "moe_jax.config",
    "Run": "moe_jax.api",
    "Sampling": "moe_jax.inference.sampling",
    "UserError": "moe_jax.config",
    "load_run": "moe_jax.api",
}
"""Imported at their first use: an error about a wrong flag comes before jax, and Ctrl-C is caught before all else."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)

"""The dense networks that a mixture of experts is compared with."""

import dataclasses

from moe_jax.config.model import Dense
from moe_jax.config.run import RunConfig

DENSE_BASELINES: dict[Dense, str] = {"none": "moe", "active": "dense-active", "total": "dense-total"}
"""`ModelConfig.dense` -> the name in tables, pictures and folders. The mixture itself comes first."""


def dense_baseline(config: RunConfig, dense: Dense) -> RunConfig:
    """The same recipe with a dense network of the same active or total parameters; "none" is the mixture itself."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dense=dense))

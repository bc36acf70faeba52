"""A small state of training, with every kind of leaf, and stores that hold it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.runs.checkpoint import CheckpointStore


def state(seed: int = 0, size: int = 64) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "params": {"blocks": {0: {"router": array(size, 4), "w": array(3, size, 5)}}, "norm": array(size)},
        "optimizer": [array(size, 4), array(3, size, 5).astype(jnp.bfloat16)],
        "step": jnp.int32(seed),
    }


def save(store: CheckpointStore, step: int, val_loss: float | None = None, size: int = 64) -> Path:
    context = {"data": "d", "progress": {"best": 1.5}}
    return store.save(state(step, size), step, val_loss=val_loss, elapsed=float(step), context=context)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())

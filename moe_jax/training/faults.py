"""Numbers that are not finite: where they are, and what is kept for whoever looks into them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.training.checkpoint import named_leaves
from moe_jax.training.step import DROPOUT, gradients, purpose_key

if TYPE_CHECKING:
    from moe_jax.training.loop import Session


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def not_finite(tree: Any) -> list[str]:
    """Names of the leaves that hold a NaN or an infinity, in the order of the tree."""
    leaves = {n: x for n, x in named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    if not leaves:
        return []
    return [
        name for name, finite in zip(leaves, np.asarray(_all_finite(list(leaves.values()))), strict=True) if not finite
    ]


def diagnose(session: "Session", step: int) -> tuple[Path, str]:
    """Keep what is needed to look into a bad step: its batch as .npy, and what is not finite as JSON.

    Returns the JSON file, and in words what was bad first: a parameter, else the optimizer's state, else a gradient
    (recomputed for this).
    """
    state, batch = session.state, session.batch(step - 1)
    bad = {"params": not_finite(state.params), "optimizer": not_finite(state.optimizer), "gradients": []}
    if not bad["params"]:
        key = purpose_key(session.config.train.seed, DROPOUT, jnp.int32(step - 1))
        gradient = jax.jit(
            lambda p, b: gradients(session.graphdef, p, b, key, state.loss_scale.scale, session.config.train)
        )
        bad["gradients"] = not_finite(gradient(state.params, batch)[0])
    first = next((f"{kind}.{names[0]}" for kind, names in bad.items() if names), "nothing that is there now")
    folder = session.folder.path / "faults"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"step_{step:08d}.npy", batch, allow_pickle=False)
    path = folder / f"step_{step:08d}.json"
    document = {"step": step, "first": first, "not_finite": bad, "skipped": int(state.skipped)}
    document |= {"batch": f"step_{step:08d}.npy", "loss_scale": float(state.loss_scale.scale)}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path, first

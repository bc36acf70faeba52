"""Find the arrays that are not finite, and keep the batch and their names for a diagnosis."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batches import MaskedBatch
from moe_jax.runs.arrays import named_leaves
from moe_jax.system.files import Folder, json_text, step_name
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.programs import Programs
from moe_jax.training.state import TrainState


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def nonfinite_leaves(tree: Any) -> list[str]:
    """Names of the leaves that hold a NaN or an infinity, in the order of the tree."""
    leaves = {n: x for n, x in named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    if not leaves:
        return []
    finite = np.asarray(_all_finite(list(leaves.values())))
    return [name for name, is_finite in zip(leaves, finite, strict=True) if not is_finite]


def diagnose(
    run: Folder, programs: Programs, state: TrainState, step: int, batch: np.ndarray | MaskedBatch, on_devices: Any
) -> tuple[Path, str]:
    """Write the batch of a bad step as .npy, and the names of the arrays that are not finite as JSON, into the folder
    `nonfinite/`. Of a batch of conversations only the tokens are written, not the weights.

    Returns the path of the JSON file, and the name of the first array that is not finite: a parameter, else an array of
    the optimizer's state, else a gradient. Gradients are recomputed if all parameters are finite, from `on_devices`:
    the batch as it lies on the devices. With several processes, all call this.
    """
    bad = {
        "params": nonfinite_leaves(state.params) + nonfinite_leaves(state.adapters),
        "optimizer": nonfinite_leaves(state.optimizer),
        "gradients": [],
    }
    if not bad["params"]:
        train, graphdef = programs.config.train, programs.training_graphdef

        @jax.jit
        def gradient(state: TrainState, batch: Any) -> Any:
            key = purpose_key(train.seed, Purpose.DROPOUT, jnp.int32(step - 1))
            scale = state.loss_scale.scale
            return programs.gradients(graphdef, state.trained, batch, key, scale, train, frozen=state.frozen)[0]

        bad["gradients"] = nonfinite_leaves(gradient(state, on_devices))
    named = [f"{kind}.{names[0]}" for kind, names in bad.items() if names]
    first = named[0] if named else "none of parameters, optimizer and gradients"
    name, array = f"nonfinite/{step_name(step)}", io.BytesIO()
    np.save(array, batch.tokens if isinstance(batch, MaskedBatch) else batch, allow_pickle=False)
    run.make("nonfinite")
    run.write(f"{name}.npy", array.getvalue())
    document = {"step": step, "first": first, "not_finite": bad, "skipped": int(state.skipped)}
    document |= {"batch": f"{step_name(step)}.npy", "loss_scale": float(state.loss_scale.scale)}
    run.write(f"{name}.json", json_text(document, indent=1) + "\n")
    return run.path / f"{name}.json", first

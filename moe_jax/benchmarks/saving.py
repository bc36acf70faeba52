"""What a checkpoint costs: how long training waits for a save, compared with the disk alone and with orbax alone.

The same state is written in turn in three ways. A plain `write` with `fsync` shows the speed of the disk. Orbax with
its defaults, synchronously, compresses and does not sync. `CheckpointStore.save` also writes the weights a second time
as safetensors, syncs, computes every digest, and reads everything back. Then the checkpoint is restored, which verifies
it first. The results are medians over the rounds.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.config import RunConfig
from moe_jax.runs import manifest
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, restore
from moe_jax.training.programs import Programs


def make_state(config: RunConfig) -> Any:
    """A train state with the configuration's shapes and dtypes, filled with noise, which cannot be compressed."""
    abstract = Programs.of(config).state_shapes
    rng = np.random.default_rng(0)

    def noise(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

    return jax.tree.map(noise, abstract)


def measure(state: Any, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds and GB of each way of writing the state below `folder`, and median seconds of restoring it.

    A restore reads files that the operating system still holds in memory.
    """
    store = CheckpointStore(folder / "run")
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    seconds: dict[str, list[float]] = {"disk": [], "orbax": [], "save": [], "verification": [], "restore": []}
    written: dict[str, int] = {}
    for step in range(1, rounds + 1):
        seconds["disk"].append(_clocked(lambda: _write_plainly(state, folder / "plain")))
        written["disk"] = _remove(folder / "plain")
        seconds["orbax"].append(_clocked(lambda: _write_by_orbax(named_leaves(state), folder / "orbax")))
        written["orbax"] = _remove(folder / "orbax")
        saved = lambda step=step: store.save(state, step, val_loss=None, elapsed=0.0, context={})  # noqa: E731
        seconds["save"].append(_clocked(saved))
        checkpoint = store.at(step)
        seconds["verification"].append(_clocked(lambda checkpoint=checkpoint: _verify(state, checkpoint)))
        seconds["restore"].append(_clocked(lambda checkpoint=checkpoint: restore(checkpoint, target)))
        written["save"] = _remove(store.folder)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shares = [100 * v / s for v, s in zip(seconds["verification"], seconds["save"], strict=True)]
    result: dict[str, float] = {}
    for name, size in written.items():
        result |= {f"{name}_GB": size / 1e9, f"{name}_seconds": medians[name]}
        result[f"{name}_seconds_per_GB"] = medians[name] / size * 1e9
    result["restore_seconds"] = medians["restore"]
    return result | {"verification_seconds": medians["verification"], "verification_percent": statistics.median(shares)}


def _clocked(work: Callable[[], object]) -> float:
    os.sync()  # earlier writes have reached the disk before the clock starts
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _verify(state: Any, checkpoint: Checkpoint) -> None:
    """The part of a save that only verifies: the digests of files and arrays, and reading everything back."""
    manifest.describe_files(checkpoint.path)
    manifest.describe_leaves(named_leaves(state))
    manifest.verify_files(checkpoint.path, checkpoint.manifest)


def _write_plainly(state: Any, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for leaf in jax.tree.leaves(state):
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _write_by_orbax(leaves: dict[str, Any], folder: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), leaves)


def _remove(path: Path) -> int:
    """Remove a file or a folder. Returns its size in bytes."""
    if path.is_file():
        size = path.stat().st_size
        path.unlink()
        return size
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    shutil.rmtree(path)
    return size

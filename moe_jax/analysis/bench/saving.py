"""What a checkpoint costs: how long a save keeps training waiting, beside the disk's own speed and orbax alone.

The same bytes are written in turn by one plain `write` and `fsync`, by orbax alone (synchronous, as it comes, which
compresses and does not sync), and by `CheckpointStore.save`, which writes the weights a second time as safetensors,
syncs, computes every digest and reads all back. Then they are restored, which verifies first. Medians over the rounds.
"""

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.config import RunConfig
from moe_jax.training import manifest
from moe_jax.training.checkpoint import CheckpointStore, named_leaves, restore
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run import abstract_model
from moe_jax.training.state import initial_state

VERIFICATION = ("describe_files", "describe_leaves", "verify_files")
"""Functions of `manifest` that orbax alone has no counterpart of: the digests, and reading everything back."""


def make_state(config: RunConfig) -> Any:
    """A train state of the configuration's shapes and dtypes, filled with noise, which no disk can compress."""
    _, shapes = abstract_model(config, "float32")
    abstract = jax.eval_shape(lambda p: initial_state(p, make_optimizer(config.train), False), shapes)
    rng = np.random.default_rng(0)

    def noise(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

    return jax.tree.map(noise, abstract)


def measure(state: Any, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds and GB of each way of writing the state below `folder`, in turn, and of restoring it, which reads what
    the system still holds in memory. Medians."""
    store = CheckpointStore(folder / "run")
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    seconds: dict[str, list[float]] = {"disk": [], "orbax": [], "save": [], "verification": [], "restore": []}
    written: dict[str, int] = {}
    for step in range(1, rounds + 1):
        seconds["disk"].append(_clocked(lambda: _write_plainly(state, folder / "plain")))
        written["disk"] = _remove(folder / "plain")
        seconds["orbax"].append(_clocked(lambda: _write_by_orbax(named_leaves(state), folder / "orbax")))
        written["orbax"] = _remove(folder / "orbax")
        with _spent(VERIFICATION) as spent:
            saved = lambda step=step: store.save(state, step, val_loss=None, elapsed=0.0, context={})  # noqa: E731
            seconds["save"].append(_clocked(saved))
        seconds["verification"].append(sum(spent))
        checkpoint = store.at(step)
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
    os.sync()  # what came before has reached the disk
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _spent(names: Sequence[str]) -> Iterator[list[float]]:
    """Seconds of each call of these functions of `manifest`."""
    spent: list[float] = []
    originals = {name: getattr(manifest, name) for name in names}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent.append(time.perf_counter() - begin)

        return call

    for name, function in originals.items():
        setattr(manifest, name, timed(function))
    try:
        yield spent
    finally:
        for name, function in originals.items():
            setattr(manifest, name, function)


def _write_plainly(state: Any, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for leaf in jax.tree.leaves(state):
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _write_by_orbax(leaves: dict[str, Any], folder: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), leaves)


def _remove(path: Path) -> int:
    """Remove a file or a folder; the bytes that were in it."""
    if path.is_file():
        size = path.stat().st_size
        path.unlink()
        return size
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    shutil.rmtree(path)
    return size

"""How long a save keeps training waiting: beside the disk's own speed, and beside orbax alone.

    uv run benchmarks/save_speed.py                            seed-158m: 1.9 GB of parameters and Adam's moments
    uv run benchmarks/save_speed.py --preset story --rounds 9
    uv run benchmarks/save_speed.py --folder /mnt/disk         on another disk

The same bytes are written in turn by one plain `write` and `fsync`, by orbax alone (synchronous, as it comes, which
compresses and does not sync), and by `CheckpointStore.save`, which writes the weights a second time as safetensors,
syncs, computes every digest and reads all back. Medians over the rounds. The last line is JSON; the same goes into
`benchmarks/`.
"""

import contextlib
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax import cli, environment
from moe_jax.commands import check_range
from moe_jax.config import PresetName, RunConfig
from moe_jax.presets import preset, with_vocabulary

VERIFICATION = ("describe_files", "describe_leaves", "verify_files")
"""Functions of `manifest` that orbax alone has no counterpart of: the digests, and reading everything back."""


@dataclass(frozen=True)
class SaveSpeed:
    """How long a save keeps training waiting. The last line is JSON."""

    preset: PresetName = "seed-158m"
    """Whose state is saved."""
    rounds: int = 5
    """Times that each way of writing is measured; medians are compared."""
    folder: str = ""
    """Where to write; the system's folder for temporary files unless given."""
    save: bool = True
    """Write the results into `benchmarks/`."""

    def execute(self) -> int:
        check_range("--rounds", self.rounds, 1, 1000)
        environment.prepare()
        from moe_jax.analysis.bench import machine

        with tempfile.TemporaryDirectory(dir=self.folder or None) as scratch:
            found = measure(make_state(with_vocabulary(preset(self.preset))), Path(scratch), self.rounds)
        for name, value in found.items():
            print(f"{value:10.3f}  {name.replace('_', ' ')}")
        if self.save:
            now = datetime.datetime.now(datetime.UTC)
            command = f"uv run benchmarks/save_speed.py --preset {self.preset} --rounds {self.rounds}"
            record = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": machine.describe()}
            path = Path("benchmarks") / f"{now:%Y-%m-%d-%H%M}-save-{self.preset}.json"
            path.write_text(json.dumps(record | {"results": found}, indent=1) + "\n", encoding="utf-8")
            print(f"saved in {path}")
        print(json.dumps(found))
        return 0


def make_state(config: RunConfig) -> Any:
    """A train state of the configuration's shapes and dtypes, filled with noise, which no disk can compress."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe_jax.training.optimizer import make_optimizer
    from moe_jax.training.run import abstract_model
    from moe_jax.training.state import initial_state

    _, shapes = abstract_model(config, "float32")
    abstract = jax.eval_shape(lambda p: initial_state(p, make_optimizer(config.train), False), shapes)
    rng = np.random.default_rng(0)

    def noise(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

    return jax.tree.map(noise, abstract)


def measure(state: Any, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds and GB of each way of writing the state below `folder`, in turn; medians."""
    from moe_jax.training.checkpoint import CheckpointStore, named_leaves

    store = CheckpointStore(folder / "run")
    seconds: dict[str, list[float]] = {"disk": [], "orbax": [], "save": [], "verification": []}
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
        written["save"] = _remove(store.folder)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shares = [100 * v / s for v, s in zip(seconds["verification"], seconds["save"], strict=True)]
    result: dict[str, float] = {}
    for name, size in written.items():
        result |= {f"{name}_GB": size / 1e9, f"{name}_seconds": medians[name]}
        result[f"{name}_seconds_per_GB"] = medians[name] / size * 1e9
    return result | {"verification_seconds": medians["verification"], "verification_percent": statistics.median(shares)}


def _clocked(work: Callable[[], object]) -> float:
    os.sync()  # what came before has reached the disk
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _spent(names: Sequence[str]) -> Iterator[list[float]]:
    """Seconds of each call of these functions of `manifest`."""
    from moe_jax.training import manifest

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
    import jax
    import numpy as np

    with path.open("wb", buffering=0) as file:
        for leaf in jax.tree.leaves(state):
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _write_by_orbax(leaves: dict[str, Any], folder: Path) -> None:
    import orbax.checkpoint as ocp

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


def run(argv: Sequence[str]) -> int:
    return cli.parse(SaveSpeed, argv, prog="save_speed.py", description=__doc__).execute()


if __name__ == "__main__":
    sys.exit(cli.main(run))

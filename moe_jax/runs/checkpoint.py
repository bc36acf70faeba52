"""Checkpoints: saved, listed, verified before they are used, and restored.

    checkpoints/step_00000100/weights.safetensors   the parameters, and the adapters if there are any
    checkpoints/step_00000100/arrays/               orbax: the rest of the state, a flat dict, leaf name -> array. Only
                                                    if training can go on from here: quantised weights have none
    checkpoints/step_00000100/manifest.json         see `manifest.py`

A folder with the name of a step is complete: orbax gives it that name once everything is written. The newest two and
the best are kept, so that a run survives one damaged checkpoint.

In a checkpoint whose manifest is of version 3, `arrays/` holds the parameters a second time. They are not read.
"""

import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import UserError
from moe_jax.parallel.processes import barrier, is_process_zero
from moe_jax.runs import manifest
from moe_jax.runs.arrays import ADAPTERS, PARAMS, WEIGHTS, Shapes, is_weight, named_leaves, read_weights, weight_shapes
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.errors import disk_cause
from moe_jax.system.files import new_folder, step_name, steps_in
from moe_jax.system.machine import versions

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """The checkpoint in a folder. Raises CheckpointCorrupted if its manifest is damaged."""
        return cls(path, manifest.read(path))

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def val_loss(self) -> float | None:
        """Loss on the fixed validation subset, in nats per token. None if this step was not evaluated."""
        return self.manifest["val_loss"]

    @property
    def elapsed(self) -> float:
        """Seconds of training until this step, summed over all processes of the run."""
        return self.manifest["elapsed"]

    @property
    def context(self) -> dict[str, Any]:
        """What a resumed run needs, and what its settings are compared with."""
        return self.manifest["context"]

    @property
    def weights_digest(self) -> str:
        """The digest of weights.safetensors. Equal digests mean equal weights."""
        return self.manifest["files"][WEIGHTS][1]


class CheckpointStore:
    """The checkpoints of one run.

    `say` is called with a message for every checkpoint that is skipped. By default it prints to stderr. Only damaged
    checkpoints are skipped. One that the system refuses to read raises OSError, since an older one in its place would
    lose good work.
    """

    def __init__(self, run: Path, say: Callable[[str], None] | None = None) -> None:
        self.folder = run / FOLDER
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True) if is_process_zero() else None)

    def save(self, state: Any, step: int, *, val_loss: float | None, elapsed: float, context: dict[str, Any]) -> Path:
        """Write a checkpoint, and remove the checkpoints that are no longer kept.

        `context` is JSON. The step may be saved already, when a resumed run makes up an evaluation: the arrays are the
        same then, and only the manifest is replaced. Of several processes, all call this. Raises UserError if the disk
        is full or the folder cannot be written. The earlier checkpoints are then kept.
        """
        from moe_jax.runs.orbax_state import save_step

        final, document = self.folder / step_name(step), _document(step, val_loss, elapsed, context)
        with _saving(final):
            if final.exists():
                if is_process_zero():
                    manifest.write(final, document | {"files": manifest.read(final)["files"]})
                barrier()
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                scored = [(c.val_loss, c.step) for c in self.list()] + [(document["val_loss"], step)]
                best = min(((loss, n) for loss, n in scored if loss is not None), default=None)
                save_step(self.folder, step, named_leaves(state), document, [best[1]] if best else [])
        return final

    def save_weights(
        self, write: Callable[[Path], None], step: int, *, elapsed: float, context: dict[str, Any]
    ) -> Path:
        """Write a checkpoint that cannot be trained. `write` writes weights.safetensors into the folder that it is
        given. Raises the errors of `save`."""
        final = self.folder / step_name(step)
        with _saving(final), new_folder(final) as draft:
            write(draft)
            files = manifest.describe_files(draft, [draft / WEIGHTS])
            manifest.write(draft, _document(step, None, elapsed, context) | {"files": files})
        return final

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, oldest first."""
        return list(steps_in(self.folder).values())

    def list(self, say: Callable[[str], None] | None = None) -> list[Checkpoint]:
        """Checkpoints whose manifest is undamaged, oldest first. The others are reported to `say`. No other file is
        verified."""
        found = []
        for path in self.paths():
            try:
                found.append(Checkpoint.read(path))
            except CheckpointCorrupted as error:
                if say is not None:
                    say(f"{path}: skipped, {error}")
        return found

    def restore_newest(self, target: Any, check: Callable[[Checkpoint], None]) -> tuple[Checkpoint, Any] | None:
        """The newest good checkpoint, and its values in the structure of `target`. None if no checkpoint is good.

        Newer checkpoints, which are damaged, are renamed to damaged_*, so that their steps can be saved again. `check`
        raises if an undamaged checkpoint belongs to another run.
        """
        for checkpoint in self._good(reversed(self.list(self.say))):
            try:
                check(checkpoint)
                state = _restore_verified(checkpoint, target)
            except CheckpointCorrupted as error:
                self.say(f"{checkpoint.path}: skipped, {error}")
                continue
            barrier()  # all have read before a folder gets another name
            if is_process_zero():
                for path in self.paths()[self.paths().index(checkpoint.path) + 1 :]:
                    damaged = path.with_name(path.name.replace("step_", "damaged_"))
                    shutil.rmtree(damaged, ignore_errors=True)  # of an earlier damage at the same step
                    path.rename(damaged)
            return checkpoint, state
        return None

    def best(self) -> Checkpoint | None:
        """The good checkpoint with the lowest validation loss. If no good one was evaluated, the newest good one.

        Damaged checkpoints that might have been better are reported to `say`.
        """

        def rank(c: Checkpoint) -> tuple[bool, float, int]:
            return (c.val_loss is None, 0, -c.step) if c.val_loss is None else (False, c.val_loss, c.step)

        return next(self._good(sorted(self.list(self.say), key=rank)), None)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. If there is none, raises UserError with the steps of the checkpoints."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in self.list()}
        if step in checkpoints:
            return checkpoints[step]
        steps = ", ".join(map(str, checkpoints)) or "none"
        raise UserError(f"--step {step}: {self.folder} has no such checkpoint; it has {steps}")

    def examine(self) -> Iterator[tuple[Path, str | None]]:
        """The folder of every checkpoint, oldest first, and the first damage in it. None if it is good."""
        for path in self.paths():
            try:
                yield path, verify(Checkpoint.read(path))
            except CheckpointCorrupted as error:
                yield path, str(error)

    def _good(self, checkpoints: Iterable[Checkpoint]) -> Iterator[Checkpoint]:
        for checkpoint in checkpoints:
            if damage := verify(checkpoint):
                self.say(f"{checkpoint.path}: skipped, {damage}")
            else:
                yield checkpoint


@contextmanager
def _saving(final: Path) -> Iterator[None]:
    """Turn an error of the file system into one line, and remove what was written: it would fill the disk."""
    try:
        yield
    except Exception as error:
        cause = disk_cause(error)
        if cause is None:
            raise
        for draft in final.parent.glob(f"{final.name}.*"):
            shutil.rmtree(draft, ignore_errors=True)
        raise UserError(
            f"{final}: the checkpoint could not be saved ({cause}); the earlier checkpoints are complete: "
            "fix that and go on with --resume"
        ) from error


def _document(step: int, val_loss: float | None, elapsed: float, context: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint, without its files. A loss that is not finite counts as none."""
    known = val_loss if val_loss is not None and math.isfinite(val_loss) else None
    document = {"version": manifest.VERSION, "step": step, "val_loss": known, "elapsed": elapsed}
    return document | {"context": context, "versions": versions()}


def verify(checkpoint: Checkpoint) -> str | None:
    """The first damage in the files of a checkpoint, in a few words. None if all files are undamaged."""
    return manifest.damage(checkpoint.path, checkpoint.manifest)


def stored_shapes(checkpoint: Checkpoint) -> Shapes:
    """Shape and dtype of every array of a checkpoint, by its name. Raises CheckpointCorrupted."""
    shapes = weight_shapes(checkpoint.path / WEIGHTS)
    arrays = checkpoint.path / "arrays"
    if arrays.exists():
        from moe_jax.runs.orbax_state import state_shapes

        shapes |= {name: shape for name, shape in state_shapes(arrays).items() if not is_weight(name)}
    return shapes


def restore(checkpoint: Checkpoint, target: Any) -> Any:
    """The saved values in the structure of `target` (arrays, or `jax.eval_shape` of them).

    Only the leaves of `target` are read, so parameters can be read without the optimizer's state. An array lies where
    its leaf of `target` lies, whatever the mesh of the run that saved it. A leaf without a sharding lies on the first
    device.

    Raises CheckpointCorrupted if a file is damaged, or a saved weight has no place in `target`, and UserError if a leaf
    is missing or has another shape or dtype.
    """
    if damage := verify(checkpoint):
        says = f"{doctor_of(checkpoint.path.parents[1])} says which checkpoints are good"
        raise CheckpointCorrupted(f"{checkpoint.path}: {damage}; {says}")
    return _restore_verified(checkpoint, target)


def _restore_verified(checkpoint: Checkpoint, target: Any) -> Any:
    leaves = named_leaves(target)
    weights = {name: leaf for name, leaf in leaves.items() if is_weight(name)}
    state = {name: leaf for name, leaf in leaves.items() if not is_weight(name)}
    saved = stored_shapes(checkpoint) if state else weight_shapes(checkpoint.path / WEIGHTS)
    for name, leaf in leaves.items():
        found = saved.get(name)
        if found is None or (found.shape, found.dtype) != (tuple(leaf.shape), leaf.dtype):
            described = "not there" if found is None else f"{list(found.shape)} {found.dtype} there"
            raise UserError(
                f"{checkpoint.path}: {name} is {described} and {list(leaf.shape)} {leaf.dtype} in this configuration; "
                "use the configuration that the run was started with"
            )
    kinds = tuple(kind for kind in (PARAMS, ADAPTERS) if any(name.startswith(kind) for name in leaves))
    for name in saved:
        if name.startswith(kinds) and name not in leaves:
            raise CheckpointCorrupted(f"{checkpoint.path}: {name} is no array of this configuration")
    arrays = read_weights(checkpoint.path / WEIGHTS, weights)
    if state:
        from moe_jax.runs.orbax_state import read_state

        arrays |= read_state(checkpoint.path / "arrays", state)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaves])


def doctor_of(run: Path) -> str:
    """The command that examines a run, for an error."""
    return f"`uv run moe-jax doctor --run {shlex.quote(str(run))}`"

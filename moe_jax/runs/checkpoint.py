"""Checkpoints: arrays saved by orbax, and a manifest with their digests. They are verified before they are used.

    checkpoints/step_00000100/arrays/               orbax: one flat dict, leaf name -> array (`arrays.py`). Only if
                                                    training can go on from here: quantised weights have none
    checkpoints/step_00000100/weights.safetensors   the parameters alone
    checkpoints/step_00000100/manifest.json         see `manifest.py`

A checkpoint is written into a temporary folder, synced to disk, and then renamed. So every folder named step_* is
complete. (Orbax's CheckpointManager commits in the same way, but the other two files could not be part of the commit.)
Earlier checkpoints are removed only after the files of the new one have been read back. The newest two and the best are
kept, so that a run survives one damaged checkpoint.

Arrays are saved by name, not by structure. An array named `params.blocks.0.ffn.router` can be read without the classes
that wrote it.
"""

import ctypes
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import UserError
from moe_jax.parallel.processes import barrier, first
from moe_jax.runs import manifest
from moe_jax.runs.arrays import ADAPTERS, PARAMS, is_trained, named_leaves, read_arrays, write_arrays, write_weights
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.errors import disk_cause
from moe_jax.system.files import Folder, step_name, step_number, write_atomically
from moe_jax.system.machine import versions

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    val_loss: float | None
    """Loss on the fixed validation subset, in nats per token. None if this step was not evaluated."""
    elapsed: float
    """Seconds of training until this step, summed over all processes of the run."""
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """The checkpoint in a folder. Raises CheckpointCorrupted if its manifest is damaged."""
        document = manifest.read(path)
        return cls(path, document["step"], document["val_loss"], document["elapsed"], document)


def _read(path: Path) -> "Checkpoint | CheckpointCorrupted":
    try:
        return Checkpoint.read(path)
    except CheckpointCorrupted as error:
        return error


type Entry = tuple[Path, Checkpoint | CheckpointCorrupted]
"""A checkpoint's folder, and either the checkpoint or why there is none."""
type Entries = list[Entry]


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest two and the best (lowest validation loss).

    `say` is called with a message for every checkpoint that is skipped. By default it prints to stderr. Only damaged
    checkpoints are skipped. One that the system refuses to read raises OSError, since an older one in its place would
    lose good work.
    """

    def __init__(self, run: Path, say: Callable[[str], None] | None = None) -> None:
        self.folder = run / FOLDER
        self._files = Folder(run, writes=first())
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True) if first() else None)

    def save(self, state: Any, step: int, *, val_loss: float | None, elapsed: float, context: dict[str, Any]) -> Path:
        """Write a checkpoint, read its files back, and remove the checkpoints that are no longer kept.

        `context` is JSON that a resumed run needs, or that its settings are compared with. Raises UserError if the disk
        is full, if the folder cannot be written, or if a file reads back with another digest. The earlier checkpoints
        are then kept.

        Of several processes, all call this. Each writes its own parts of the arrays, and the first one the rest. An
        error of one ends the others (`parallel.processes.joined`), so no manifest is written then.
        """
        leaves = named_leaves(state)

        def write(draft: Path) -> dict[str, Any]:
            if is_trained(leaves):
                write_arrays(draft, leaves)
            write_weights(draft, leaves)
            return manifest.describe_leaves(leaves)

        return self.save_as(write, step, val_loss=val_loss, elapsed=elapsed, context=context)

    def save_as(
        self,
        write: Callable[[Path], dict[str, Any]],
        step: int,
        *,
        val_loss: float | None,
        elapsed: float,
        context: dict[str, Any],
    ) -> Path:
        """The same, of arrays that `write` writes into the folder that it is given. It returns what
        `manifest.describe_leaves` says of them."""
        final = self.folder / step_name(step)
        draft = self.folder / f"tmp_{step:08d}"
        known = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        document = {"version": manifest.VERSION, "step": step, "val_loss": known, "elapsed": elapsed}
        try:
            if first():
                self._files.path.mkdir(parents=True, exist_ok=True)
                self._files.make(FOLDER)
                self.remove_interrupted_saves()
                draft.mkdir()
            barrier()
            described = write(draft)
            barrier()  # all files but the manifest are there
            if first():
                document |= {"files": manifest.describe_files(draft), **described}
                document |= {"context": context, "versions": versions()}
                (draft / manifest.NAME).write_text(manifest.render(document), encoding="utf-8", newline="\n")
                _sync(*draft.rglob("*"), draft)
                self._publish(draft, final)
        except Exception as error:
            if first():
                _remove_draft(draft)
            cause = disk_cause(error)
            if cause is None:
                raise
            raise UserError(
                f"{final}: the checkpoint could not be saved ({cause}); the earlier checkpoints are complete: "
                "fix that and go on with --resume"
            ) from error
        if first():
            self._remove_old(final)
        barrier()
        _give_memory_back()
        return final

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, oldest first."""
        steps = {name: step for name in self._files.names(FOLDER) if (step := step_number(name)) is not None}
        return [self.folder / name for name in sorted(steps, key=steps.__getitem__)]

    def list(self) -> list[Checkpoint]:
        """Checkpoints whose manifest is undamaged, oldest first. Their other files are not verified."""
        return [entry for _, entry in self._entries() if isinstance(entry, Checkpoint)]

    def _entries(self) -> Entries:
        """Every checkpoint, oldest first."""
        return [(path, _read(path)) for path in self.paths()]

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are undamaged. Reports newer, damaged checkpoints to `say`."""
        return next(self._good(reversed(self._entries())), None)

    def restore_newest(self, target: Any, check: Callable[[Checkpoint], None]) -> tuple[Checkpoint, Any] | None:
        """The newest good checkpoint, and its values in the structure of `target`. None if no checkpoint is good.

        Newer checkpoints, which are damaged, are renamed by `mark_damaged`. `check` raises if an undamaged checkpoint
        belongs to another run.
        """
        entries = self._entries()
        for checkpoint in self._good(reversed(entries)):
            try:
                check(checkpoint)
                state = _restore_verified(checkpoint, target)
            except CheckpointCorrupted as error:
                self.say(f"{checkpoint.path}: skipped, {error}")
                continue
            barrier()  # before a folder gets another name
            paths = [path for path, _ in entries]
            for path in paths[paths.index(checkpoint.path) + 1 :]:
                self.mark_damaged(path)
            return checkpoint, state
        return None

    def best(self) -> Checkpoint | None:
        """The good checkpoint with the lowest validation loss. If no good one was evaluated, the newest good one.

        Checkpoints with a damaged manifest are reported to `say` first. Their loss is unknown, so each may be the best.
        """

        def rank(entry: Entry) -> tuple[int, float, int]:
            _, there = entry
            if isinstance(there, CheckpointCorrupted):
                return 0, 0, 0
            return (1, there.val_loss, there.step) if there.val_loss is not None else (2, 0, -there.step)

        return next(self._good(sorted(self._entries(), key=rank)), None)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. If there is none, raises UserError with the steps of the checkpoints."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in self.list()}
        if step in checkpoints:
            return checkpoints[step]
        steps = ", ".join(map(str, checkpoints)) or "none"
        raise UserError(f"--step {step}: {self.folder} has no such checkpoint; it has {steps}")

    def remove_interrupted_saves(self) -> None:
        for name in self.interrupted_saves():
            self._files.remove(f"{FOLDER}/{name}")

    def interrupted_saves(self) -> tuple[str, ...]:
        """Names of the folders that interrupted saves have left."""
        return tuple(name for name in self._files.names(FOLDER) if name.startswith("tmp_"))

    def mark_damaged(self, path: Path) -> Path:
        """Rename a damaged checkpoint to damaged_*: no program uses it then. An older folder of that name is kept."""
        taken = self._files.names(FOLDER)
        plain = path.name.replace("step_", "damaged_")
        free = next(name for n in range(len(taken) + 1) if (name := f"{plain}.{n + 1}" if n else plain) not in taken)
        if self._files.writes:
            path.rename(path.with_name(free))
        return path.with_name(free)

    def _good(self, entries: Iterable[Entry]) -> Iterator[Checkpoint]:
        for path, there in entries:
            damage = verify(there) if isinstance(there, Checkpoint) else str(there)
            if isinstance(there, Checkpoint) and damage is None:
                yield there
            else:
                self.say(f"{path}: skipped, {damage}")

    def _publish(self, draft: Path, final: Path) -> None:
        """Give a complete draft its name.

        The step may be saved already: a resumed run makes up an evaluation that a signal has prevented. The arrays are
        the same then, and only the manifest of the draft is taken.
        """
        if final.exists():
            there, here = manifest.read(final), manifest.read(draft)
            if there["state"] == here["state"]:
                write_atomically(final / manifest.NAME, manifest.render(here | {"files": there["files"]}))
                shutil.rmtree(draft, ignore_errors=True)
                return
            shutil.rmtree(final)
        draft.rename(final)
        _sync(self.folder)

    def _remove_old(self, newest: Path) -> None:
        """Read back the newest checkpoint, then remove all but the newest two and the best."""
        damage = manifest.verify_files(newest, manifest.read(newest))
        if damage is not None:
            raise UserError(
                f"{newest}: {damage} between writing and reading it back; the earlier checkpoints are kept: "
                "check the disk, then go on with --resume"
            )
        checkpoints = self.list()
        evaluated = [(c.val_loss, c.step) for c in checkpoints if c.val_loss is not None]
        kept = {min(evaluated)[1]} if evaluated else set()
        kept |= {c.step for c in checkpoints[-2:]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                self._files.remove(f"{FOLDER}/{checkpoint.path.name}")


def restore(checkpoint: Checkpoint, target: Any) -> Any:
    """The saved values in the structure of `target` (arrays, or `jax.eval_shape` of them).

    Only the leaves of `target` are read, so parameters can be read without the optimizer's state. An array lies where
    its leaf of `target` lies, whatever the mesh of the run that saved it. A leaf without a sharding lies on the first
    device.

    Raises CheckpointCorrupted if a file or an array is damaged, or a saved weight has no place in `target`, and
    UserError if a leaf is missing or has another shape or dtype.
    """
    damage = verify(checkpoint)
    if damage is not None:
        says = f"{doctor_of(checkpoint.path.parents[1])} says which checkpoints are good"
        raise CheckpointCorrupted(f"{checkpoint.path}: {damage}; {says}")
    return _restore_verified(checkpoint, target)


def doctor_of(run: Path) -> str:
    """The command that examines a run, for an error."""
    return f"`uv run python -m moe_jax doctor --run {shlex.quote(str(run))}`"


def verify(checkpoint: Checkpoint) -> str | None:
    """The first damage in the files of a checkpoint, in a few words. None if all files are undamaged."""
    return manifest.verify_files(checkpoint.path, checkpoint.manifest)


def _restore_verified(checkpoint: Checkpoint, target: Any) -> Any:
    leaves, saved = named_leaves(target), manifest.leaves_of(checkpoint.manifest)
    for name, leaf in leaves.items():
        there, here = saved.get(name), (tuple(leaf.shape), str(leaf.dtype))
        if there is None or (there.shape, there.dtype) != here:
            described = "not there" if there is None else f"{list(there.shape)} {there.dtype} there"
            raise UserError(
                f"{checkpoint.path}: {name} is {described} and {list(here[0])} {here[1]} in this configuration; "
                "use the configuration that the run was started with"
            )
    kinds = tuple({PARAMS, ADAPTERS} & {name.partition(".")[0] + "." for name in leaves})
    for name in saved:
        if name.startswith(kinds) and name not in leaves:
            raise CheckpointCorrupted(f"{checkpoint.path}: {name} is no array of this configuration")
    places = {name: getattr(leaf, "sharding", None) for name, leaf in leaves.items()}
    arrays = read_arrays(checkpoint.path, {name: saved[name] for name in leaves}, places)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaves])


def _remove_draft(draft: Path) -> None:
    """Remove a draft. Orbax's threads may still write after an error, and then its folder is there again: this repeats
    until it has been gone for half a second. The next save would remove what comes even later.
    """
    gone = 0
    for _ in range(100):
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
            gone = 0
        elif (gone := gone + 1) > 10:
            return
        time.sleep(0.05)


def _give_memory_back() -> None:
    """Make glibc return the free memory inside its heap to the system. The end of the heap stays: see
    `environment.keep_freed_memory`.

    Orbax starts new threads at each save. Without this, the free memory grew by 0.2 MB at each save of preset nano,
    without limit.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(ctypes.c_size_t(2**62))


def _sync(*paths: Path) -> None:
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue  # Windows cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

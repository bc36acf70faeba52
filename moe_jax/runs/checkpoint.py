"""Checkpoints: arrays saved by orbax, and a manifest with their digests. They are verified before they are used.

    checkpoints/step_00000100/arrays/               orbax: one flat dict, leaf name -> array (`arrays.py`)
    checkpoints/step_00000100/weights.safetensors   the parameters alone, for other programs
    checkpoints/step_00000100/manifest.json         see `manifest.py`

A checkpoint is written into a temporary folder, synced to disk, and then renamed. So every folder named step_* is
complete. Earlier checkpoints are removed only after the files of the new one have been read back. The newest two and
the best are kept, so that a run survives one damaged checkpoint.

A flipped bit is found by digests: `manifest.verify_files` compares every file before it is used, and `read_arrays`
compares every array after it is read. `python -m moe_jax doctor` does both for all checkpoints.

Arrays are saved by name, not by structure. An array named `params.blocks.0.ffn.router` can be read without the classes
that wrote it.
"""

import ctypes
import errno
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
from moe_jax.runs.arrays import PARAMS, named_leaves, read_arrays, write_arrays, write_weights
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable
from moe_jax.runs.migrations import MANIFEST_VERSION
from moe_jax.system.files import disk_cause
from moe_jax.system.folders import Folder, Unwritten, unguarded
from moe_jax.system.machine import versions
from moe_jax.system.step_names import REPLACED, checkpoint_step, step_name, step_number

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


type Entry = tuple[Path, Checkpoint | CheckpointCorrupted | CheckpointUnreadable]
"""A checkpoint's folder, and either the checkpoint or why there is none."""
type Entries = list[Entry]


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest two and the best (lowest validation loss).

    `say` is called with a message for every checkpoint that is skipped. It prints to stderr unless given. `guard` is
    called before each change of the folder: see `Folder`. Only damaged checkpoints are skipped. One that the system
    refuses to read raises CheckpointUnreadable, since an older one in its place would lose good work.
    """

    def __init__(
        self, run: Path, say: Callable[[str], None] | None = None, guard: Callable[[], None] | None = None
    ) -> None:
        self.folder = run / FOLDER
        self._files = Folder(run, guard or unguarded) if first() else Unwritten(run)
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True) if first() else None)

    def save(self, state: Any, step: int, *, val_loss: float | None, elapsed: float, context: dict[str, Any]) -> Path:
        """Write a checkpoint, read its files back, and remove the checkpoints that are no longer kept.

        `context` is JSON that a resumed run needs, or that its settings are compared with. Raises UserError if the disk
        is full, if the folder cannot be written, or if a file reads back with another digest. The earlier checkpoints
        are then kept.

        Of several processes, all call this. Each writes its own parts of the arrays, and the first one the rest. An
        error of one ends the others (`parallel.processes.joined`), so no manifest is written then.
        """
        final = self.folder / step_name(step)
        draft = self.folder / f"tmp_{step:08d}"
        leaves = named_leaves(state)
        try:
            if first():
                self._make_draft(draft, leaves)
            barrier()
            write_arrays(draft, leaves)
            write_weights(draft, leaves)
            described = manifest.describe_leaves(leaves)
            barrier()  # all files but the manifest are there
            if first():
                known = val_loss if val_loss is not None and math.isfinite(val_loss) else None
                document = {"version": MANIFEST_VERSION, "step": step, "val_loss": known, "elapsed": elapsed}
                document |= {"files": manifest.describe_files(draft), **described}
                document |= {"context": context, "versions": versions()}
                (draft / manifest.NAME).write_text(manifest.render(document), encoding="utf-8", newline="\n")
                _sync(draft)
                self._publish(draft, final)
        except Exception as error:
            if first():
                _remove_draft(draft)
            cause = disk_cause(error)
            if cause is None:
                raise
            raise UserError(
                f"{final}: the checkpoint could not be saved ({cause}); the earlier checkpoints are complete: "
                "mend that and go on with --resume"
            ) from error
        if first():
            self._remove_old(final)
        barrier()
        _give_memory_back()
        return final

    def _make_draft(self, draft: Path, leaves: dict[str, Any]) -> None:
        self._files.guard()
        self._files.path.mkdir(parents=True, exist_ok=True)
        self._files.make(FOLDER)
        self.remove_interrupted_saves()
        _check_room(self.folder, leaves)
        draft.mkdir()

    def list(self) -> list[Checkpoint]:
        """Checkpoints whose manifest is undamaged, oldest first. Their other files are not verified."""
        return [found for _, found in _readable(self.list_all()) if isinstance(found, Checkpoint)]

    def list_all(self) -> Entries:
        """Every checkpoint, oldest first. Includes checkpoints whose manifest is damaged or cannot be read."""
        names = self._files.names(FOLDER)
        # If a step was saved twice, the older folder (.replaced) counts only while the newer folder is missing.
        names = [n for n in names if not n.endswith(REPLACED) or n.removesuffix(REPLACED) not in names]
        steps = {n: step for n in names if (step := checkpoint_step(n)) is not None}
        found: Entries = []
        for name in sorted(steps, key=steps.__getitem__):
            path = self.folder / name
            try:
                m = manifest.read(path)
                found.append((path, Checkpoint(path, m["step"], m["val_loss"], m["elapsed"], m)))
            except (CheckpointCorrupted, CheckpointUnreadable) as error:
                found.append((path, error))
        return found

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are undamaged. Reports newer, damaged checkpoints to `say`."""
        return next(self._good(reversed(self.list_all())), None)

    def restore_newest(self, target: Any, check: Callable[[Checkpoint], None]) -> tuple[Checkpoint, Any] | None:
        """The newest good checkpoint, and its values in the structure of `target`. None if no checkpoint is good.

        Newer checkpoints, which are damaged, are renamed by `mark_damaged`. `check` raises if an undamaged checkpoint
        belongs to another run.
        """
        entries = self.list_all()
        for checkpoint in self._good(reversed(entries)):
            try:
                check(checkpoint)
                state = _restore_verified(checkpoint, target)
            except CheckpointCorrupted as error:
                self.say(f"{checkpoint.path}: skipped, {error}")
                continue
            barrier()  # before a folder gets another name
            newer = [path for path, _ in entries].index(checkpoint.path) + 1
            for path, _ in entries[newer:]:
                self.mark_damaged(path)
            return checkpoint, state
        return None

    def best(self) -> Checkpoint | None:
        """The good checkpoint with the lowest validation loss. If no good one was evaluated, the newest good one.

        Checkpoints with a damaged manifest are reported to `say` first. Their loss is unknown, so each may be the best.
        """
        entries = self.list_all()
        whole = [(found.val_loss, path, found) for path, found in _readable(entries) if isinstance(found, Checkpoint)]
        evaluated = [entry for entry in whole if entry[0] is not None]
        ranked: Entries = [entry for entry in entries if isinstance(entry[1], CheckpointCorrupted)]
        ranked += [(path, found) for _, path, found in sorted(evaluated, key=lambda e: (e[0], e[2].step))]
        ranked += [entry for entry in reversed(entries) if entry not in ranked]
        return next(self._good(ranked), None)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. If there is none, raises UserError with the steps of the checkpoints."""
        checkpoints = self.list()
        for checkpoint in checkpoints:
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(c.step) for c in checkpoints) or "none"
        raise UserError(f"--step {step}: {self.folder} has no such checkpoint; it has {steps}")

    def remove_interrupted_saves(self) -> tuple[Path, ...]:
        """Remove the files of interrupted saves, and return their paths. Restore a .replaced folder that is needed."""
        names = self._files.names(FOLDER)
        removed = [*self.interrupted_saves()]
        for name in names:
            whole = name.removesuffix(REPLACED)
            if whole != name and step_number(whole) is not None:
                if whole in names:
                    removed.append(name)
                else:
                    self._files.rename(f"{FOLDER}/{name}", whole)
        for name in removed:
            self._files.remove_tree(f"{FOLDER}/{name}")
        return tuple(self.folder / name for name in removed)

    def interrupted_saves(self) -> tuple[str, ...]:
        """Names of the folders that interrupted saves have left."""
        return tuple(name for name in self._files.names(FOLDER) if name.startswith("tmp_"))

    def mark_damaged(self, path: Path) -> Path:
        """Rename a damaged checkpoint to damaged_*: no program uses it then. An older folder of that name is kept."""
        taken = self._files.names(FOLDER)
        plain = path.name.replace("step_", "damaged_").removesuffix(REPLACED)
        free = next(name for n in range(len(taken) + 1) if (name := f"{plain}.{n + 1}" if n else plain) not in taken)
        return self._files.rename(f"{FOLDER}/{path.name}", free)

    def _good(self, entries: Iterable[Entry]) -> Iterator[Checkpoint]:
        for path, found in _readable(entries):
            damage = verify(found) if isinstance(found, Checkpoint) else str(found)
            if isinstance(found, Checkpoint) and damage is None:
                yield found
            else:
                self.say(f"{path}: skipped, {damage}")

    def _publish(self, draft: Path, final: Path) -> None:
        replaced = final.name + REPLACED
        if self._files.status(f"{FOLDER}/{final.name}"):  # the same step again, after a resume from an earlier one
            self._files.rename(f"{FOLDER}/{final.name}", replaced)
        self._files.rename(f"{FOLDER}/{draft.name}", final.name)
        _sync_path(self.folder)
        if self._files.status(f"{FOLDER}/{replaced}"):
            self._files.remove_tree(f"{FOLDER}/{replaced}")

    def _remove_old(self, newest: Path) -> None:
        """Read back the newest checkpoint, then remove all but the newest two and the best."""
        damage = manifest.verify_files(newest, manifest.read(newest))
        if damage is not None:
            raise UserError(
                f"{newest}: {damage} between writing and reading it back; the earlier checkpoints are kept: "
                "look after the disk, then go on with --resume"
            )
        checkpoints = [found for _, found in self.list_all() if isinstance(found, Checkpoint)]
        evaluated = [(c.val_loss, c.step) for c in checkpoints if c.val_loss is not None]
        kept = {min(evaluated)[1]} if evaluated else set()
        kept |= {c.step for c in checkpoints[-2:]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                self._files.remove_tree(f"{FOLDER}/{checkpoint.path.name}")


def _readable(entries: Iterable[Entry]) -> Iterator[tuple[Path, Checkpoint | CheckpointCorrupted]]:
    """The entries. Raises the error of the first one that the system refuses to read."""
    for path, found in entries:
        if isinstance(found, CheckpointUnreadable):
            raise found
        yield path, found


def restore(checkpoint: Checkpoint, target: Any) -> Any:
    """The saved values in the structure of `target` (arrays, or `jax.eval_shape` of them).

    Only the leaves of `target` are read, so parameters can be read without the optimizer's state. An array lies where
    its leaf of `target` lies, whatever the mesh of the run that saved it. A leaf without a sharding lies on the first
    device.

    Raises CheckpointCorrupted if a file or an array is damaged, and UserError if a leaf is missing or has another shape
    or dtype.
    """
    damage = verify(checkpoint)
    if damage is not None:
        raise CheckpointCorrupted(
            f"{checkpoint.path}: {damage}; `uv run python -m moe_jax doctor --run "
            f"{shlex.quote(str(checkpoint.path.parents[1]))}` says "
            "which checkpoints are good"
        )
    return _restore_verified(checkpoint, target)


def verify(checkpoint: Checkpoint) -> str | None:
    """The first damage in the files of a checkpoint, in a few words. None if all files are undamaged."""
    return manifest.verify_files(checkpoint.path, checkpoint.manifest)


def _restore_verified(checkpoint: Checkpoint, target: Any) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(target)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    saved = manifest.leaves_of(checkpoint.manifest)
    for name, (_, leaf) in zip(names, leaves, strict=True):
        there, here = saved.get(name), (tuple(leaf.shape), str(leaf.dtype))
        if there is None or (there.shape, there.dtype) != here:
            described = "not there" if there is None else f"{list(there.shape)} {there.dtype} there"
            raise UserError(
                f"{checkpoint.path}: {name} is {described} and {list(here[0])} {here[1]} in this configuration; "
                "use the configuration that the run was started with"
            )
    places = {name: getattr(leaf, "sharding", None) for name, (_, leaf) in zip(names, leaves, strict=True)}
    arrays = read_arrays(checkpoint.path, {name: saved[name] for name in names}, places)
    return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in names])


def _check_room(folder: Path, leaves: dict[str, Any]) -> None:
    """Raise OSError if the disk has too little room for the arrays.

    This is checked before anything is written, because after a failed write orbax's other threads continue for a while
    and log errors.
    """
    needed = sum(x.nbytes * (2 if name.startswith(PARAMS) else 1) for name, x in leaves.items())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _remove_draft(draft: Path) -> None:
    """Remove the files of a failed save. Orbax's threads may still write, so this repeats until nothing is left."""
    for _ in range(20):
        shutil.rmtree(draft, ignore_errors=True)
        time.sleep(0.05)
        if not draft.exists():
            return


def _give_memory_back() -> None:
    """Make glibc return its free memory to the system.

    Orbax starts new threads at each save. Without this, the free memory in their arenas grew by 0.2 MB at each save of
    preset nano, without limit.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

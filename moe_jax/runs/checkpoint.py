"""Checkpoints: arrays saved by orbax, and a manifest with their digests. They are verified before they are used.

    checkpoints/step_00000100/arrays/               orbax: one flat dict, leaf name -> array
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

import contextlib
import ctypes
import errno
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from moe_jax.config import UserError
from moe_jax.runs import manifest
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.runs.migrations import MANIFEST_VERSION
from moe_jax.system.machine import versions

WEIGHTS = "weights.safetensors"
_PARAMS = "params."


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


type Entry = tuple[Path, Checkpoint | CheckpointCorrupted]
"""A checkpoint's folder, and either the checkpoint or the error in its manifest."""
type Entries = list[Entry]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path: {"params.blocks.0.ffn.router": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest two and the best (lowest validation loss).

    `say` is called with a message for every checkpoint that is skipped. It prints to stderr unless given.
    """

    def __init__(self, run: Path, say: Callable[[str], None] | None = None) -> None:
        self.folder = run / "checkpoints"
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))

    def save(self, state: Any, step: int, *, val_loss: float | None, elapsed: float, context: dict[str, Any]) -> Path:
        """Write a checkpoint, read its files back, and remove the checkpoints that are no longer kept.

        `context` is JSON that a resumed run needs, or that its settings are compared with. Raises UserError if the disk
        is full, if the folder cannot be written, or if a file reads back with another digest. The earlier checkpoints
        are then kept.
        """
        final = self.folder / f"step_{step:08d}"
        draft = self.folder / f"tmp_{step:08d}_{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.remove_interrupted_saves()
            leaves = named_leaves(state)
            _check_room(self.folder, leaves)
            draft.mkdir()
            _write_arrays(draft, leaves)
            write_weights(draft, leaves)
            known = val_loss if val_loss is not None and math.isfinite(val_loss) else None
            document = {"version": MANIFEST_VERSION, "step": step, "val_loss": known, "elapsed": elapsed}
            document |= {"files": manifest.describe_files(draft), **manifest.describe_leaves(leaves)}
            document |= {"context": context, "versions": versions()}
            (draft / manifest.NAME).write_text(manifest.render(document), encoding="utf-8", newline="\n")
            _sync(draft)
            self._publish(draft, final)
        except Exception as error:
            _remove_draft(draft)
            cause = _disk_cause(error)
            if cause is None:
                raise
            raise UserError(
                f"{final}: the checkpoint could not be saved ({cause}); the earlier checkpoints are complete: "
                "mend that and go on with --resume"
            ) from error
        self._remove_old(final)
        _give_memory_back()
        return final

    def list(self) -> list[Checkpoint]:
        """Checkpoints whose manifest is undamaged, oldest first. Their other files are not verified."""
        return [found for _, found in self.list_all() if isinstance(found, Checkpoint)]

    def list_all(self) -> Entries:
        """Every checkpoint, oldest first. Includes checkpoints whose manifest is damaged."""
        found: Entries = []
        for path in sorted(self.folder.glob("step_*")):
            # If a step was saved twice, the older folder (.replaced) counts only while the newer folder is missing.
            replaced = path.name.endswith(".replaced") and not path.with_suffix("").exists()
            if (re.fullmatch(r"step_\d{8,}", path.name) or replaced) and path.is_dir():
                try:
                    m = manifest.read(path)
                    found.append((path, Checkpoint(path, m["step"], m["val_loss"], m["elapsed"], m)))
                except CheckpointCorrupted as error:
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
        for checkpoint in self._good(reversed(self.list_all())):
            try:
                check(checkpoint)
                state = _restore_verified(checkpoint, target)
            except CheckpointCorrupted as error:
                self.say(f"{checkpoint.path}: skipped, {error}")
                continue
            for path, _ in self.list_all():
                if path.name > checkpoint.path.name:
                    self.mark_damaged(path)
            return checkpoint, state
        return None

    def best(self) -> Checkpoint | None:
        """The good checkpoint with the lowest validation loss. If no good one was evaluated, the newest good one."""
        entries = self.list_all()
        whole = [(found.val_loss, path, found) for path, found in entries if isinstance(found, Checkpoint)]
        evaluated = [entry for entry in whole if entry[0] is not None]
        ranked: Entries = [(path, found) for _, path, found in sorted(evaluated, key=lambda e: (e[0], e[2].step))]
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
        removed = [*self.folder.glob("tmp_*")]
        for path in self.folder.glob("step_*.replaced"):
            whole = path.with_suffix("")
            if whole.exists():
                removed.append(path)
            else:
                path.rename(whole)
        for path in removed:
            shutil.rmtree(path)
        return tuple(removed)

    def mark_damaged(self, path: Path) -> Path:
        """Rename a damaged checkpoint to damaged_*: no program uses it then. Replaces an older folder of that name."""
        aside = self.folder / path.name.replace("step_", "damaged_").removesuffix(".replaced")
        if aside.exists():
            shutil.rmtree(aside)
        return path.rename(aside)

    def _good(self, entries: Iterable[Entry]) -> Iterator[Checkpoint]:
        for path, found in entries:
            damage = verify(found) if isinstance(found, Checkpoint) else str(found)
            if isinstance(found, Checkpoint) and damage is None:
                yield found
            else:
                self.say(f"{path}: skipped, {damage}")

    def _publish(self, draft: Path, final: Path) -> None:
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():  # the same step again, after a resume from an earlier one
            final.rename(replaced)
        draft.rename(final)
        _sync_path(self.folder)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _remove_old(self, newest: Path) -> None:
        """Read back the newest checkpoint, then remove all but the newest two and the best."""
        damage = manifest.verify_files(newest, manifest.read(newest))
        if damage is not None:
            raise UserError(
                f"{newest}: {damage} between writing and reading it back; the earlier checkpoints are kept: "
                "look after the disk, then go on with --resume"
            )
        checkpoints = self.list()
        evaluated = [(c.val_loss, c.step) for c in checkpoints if c.val_loss is not None]
        kept = {min(evaluated)[1]} if evaluated else set()
        kept |= {c.step for c in checkpoints[-2:]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                shutil.rmtree(checkpoint.path)


def restore(checkpoint: Checkpoint, target: Any) -> Any:
    """The saved values in the structure of `target` (arrays, or `jax.eval_shape` of them).

    Only the leaves of `target` are read, so parameters can be read without the optimizer's state. Raises
    CheckpointCorrupted if a file or an array is damaged, and UserError if a leaf is missing or has another shape or
    dtype.
    """
    damage = verify(checkpoint)
    if damage is not None:
        raise CheckpointCorrupted(
            f"{checkpoint.path}: {damage}; `python -m moe_jax doctor` says which checkpoints are good"
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
    arrays = read_arrays(checkpoint.path, {name: saved[name] for name in names})
    return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in names])


def read_arrays(path: Path, wanted: dict[str, manifest.Leaf]) -> dict[str, jax.Array]:
    """Read the `wanted` leaves, and compare each with its digest. Raises CheckpointCorrupted if one is damaged."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = {n: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype), sharding=sharding) for n, leaf in wanted.items()}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(
                (path / "arrays").resolve(),
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        # If files contradict each other, orbax and tensorstore raise many kinds of errors.
        raise CheckpointCorrupted(f"its arrays cannot be read ({' '.join(str(error).split())[:200]})") from error
    described = manifest.describe_leaves(arrays)["leaves"]
    for name, leaf in wanted.items():
        if described[name][2] != leaf.digest:
            raise CheckpointCorrupted(f"{name} is not the array that was saved")
    return arrays


def _write_arrays(folder: Path, leaves: dict[str, Any]) -> None:
    # Without compression: trained weights hardly compress, and zstd took most of the time of a save.
    with _without_traces(), ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
        checkpointer.save((folder / "arrays").resolve(), leaves)


def _check_room(folder: Path, leaves: dict[str, Any]) -> None:
    """Raise OSError if the disk has too little room for the arrays.

    This is checked before anything is written, because after a failed write orbax's other threads continue for a while
    and log errors.
    """
    needed = sum(x.nbytes * (2 if name.startswith(_PARAMS) else 1) for name, x in leaves.items())
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


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Silence orbax's threads, which log a traceback for every error. The one line of our UserError is enough."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def write_weights(folder: Path, leaves: dict[str, Any]) -> None:
    weights = {n.removeprefix(_PARAMS): np.asarray(x) for n, x in leaves.items() if n.startswith(_PARAMS)}
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, folder / WEIGHTS)


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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _disk_cause(error: Exception) -> str | None:
    """The cause of an error of the file system, or None for another error. For tensorstore and safetensors, it is found
    in the text of the error."""
    if isinstance(error, OSError) and error.errno is not None:
        return "the disk is full" if error.errno in _FULL else error.strerror or str(error)
    if any(os.strerror(number) in str(error) for number in _FULL):
        return "the disk is full"
    return str(error) if isinstance(error, OSError) else None

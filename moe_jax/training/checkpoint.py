"""Checkpoints: orbax arrays under a manifest, published by a rename.

    checkpoints/step_00000100/arrays/         orbax: one flat dict, leaf name -> array
    checkpoints/step_00000100/manifest.json   step, validation loss, every file's size and digest, every leaf's shape
                                              and dtype, digests of tokenizer and data, versions

A checkpoint is written into a temporary folder, synced, and renamed: a folder named step_* is complete. Orbax alone
does not notice a flipped bit, so files are compared with the manifest before anything is restored.

Leaves are saved by name, not by structure: a file that says `params.blocks.0.ffn.router` can be read without the
classes that wrote it.
"""

import errno
import importlib.metadata
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from moe_jax.config import UserError

MANIFEST_VERSION = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    val_loss: float | None
    """Loss on the fixed validation subset, in nats per token; None where this step was not evaluated."""
    elapsed: float
    """Seconds of training until this step, over all the times that the run was resumed."""
    manifest: dict[str, Any]


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path: {"params.blocks.0.ffn.router": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest and the best (lowest validation loss)."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def save(self, state: Any, step: int, *, val_loss: float | None, elapsed: float, context: dict[str, str]) -> Path:
        """Write a checkpoint and remove those that are neither newest nor best.

        `context` holds digests that a resumed run is compared with. Raises UserError where the disk is full or the
        folder cannot be written; the checkpoints that were there stay.
        """
        final = self.folder / f"step_{step:08d}"
        draft = self.folder / f"tmp_{step:08d}_{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("tmp_*"):
                shutil.rmtree(leftover)
            leaves = named_leaves(state)
            draft.mkdir()
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((draft / "arrays").resolve(), leaves)
            manifest = {
                "version": MANIFEST_VERSION,
                "step": step,
                "val_loss": val_loss,
                "elapsed": elapsed,
                "files": _digests(draft),
                "leaves": {name: [list(x.shape), str(x.dtype)] for name, x in leaves.items()},
                "context": context,
                "versions": versions(),
            }
            (draft / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _sync(draft)
            if final.exists():
                shutil.rmtree(final)  # the same step again, after a resume from an earlier one
            draft.rename(final)
            _sync_path(self.folder)
        except Exception as error:
            shutil.rmtree(draft, ignore_errors=True)
            cause = _disk_cause(error)
            if cause is None:
                raise
            raise UserError(
                f"{final}: the checkpoint could not be saved ({cause}); the earlier ones are whole: "
                "mend that and go on with --resume"
            ) from error
        self._remove_old()
        return final

    def list(self) -> list[Checkpoint]:
        """Complete checkpoints whose manifest can be read, oldest first."""
        found = []
        for path in sorted(self.folder.glob("step_*")):
            if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir():
                manifest = _read_manifest(path)
                if manifest is not None:
                    found.append(
                        Checkpoint(path, manifest["step"], manifest["val_loss"], manifest["elapsed"], manifest)
                    )
        return found

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are as they were written; says on the way what is damaged."""
        for checkpoint in reversed(self.list()):
            damage = verify(checkpoint)
            if damage is None:
                return checkpoint
            print(f"{checkpoint.path}: skipped, {damage}", flush=True)
        return None

    def best(self) -> Checkpoint | None:
        """The checkpoint of the lowest validation loss; of those never evaluated, the newest."""
        checkpoints = self.list()
        evaluated = [(c.val_loss, c.step, c) for c in checkpoints if c.val_loss is not None]
        if evaluated:
            return min(evaluated)[-1]
        return checkpoints[-1] if checkpoints else None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises UserError, with the steps that there are."""
        checkpoints = self.list()
        for checkpoint in checkpoints:
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(c.step) for c in checkpoints) or "none"
        raise UserError(f"--step {step}: {self.folder} has no such checkpoint; it has {steps}")

    def _remove_old(self) -> None:
        checkpoints, best = self.list(), self.best()
        for checkpoint in checkpoints[:-1]:
            if checkpoint != best:
                shutil.rmtree(checkpoint.path)


def restore(checkpoint: Checkpoint, target: Any) -> Any:
    """The saved values in the structure of `target` (arrays, or `jax.eval_shape` of them).

    Only the leaves that `target` has are read, so parameters can be had without the optimizer. Raises UserError
    where a file is damaged, or where a leaf is missing or of another shape.
    """
    damage = verify(checkpoint)
    if damage is not None:
        raise UserError(f"{checkpoint.path}: {damage}; name another checkpoint with --step")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(target)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    saved = checkpoint.manifest["leaves"]
    for name, (_, leaf) in zip(names, leaves, strict=True):
        wanted = [list(leaf.shape), str(leaf.dtype)]
        if saved.get(name) != wanted:
            raise UserError(
                f"{checkpoint.path}: {name} is {saved.get(name)} there and {wanted} in this configuration; "
                "use the configuration that the run was started with"
            )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=sharding)
        for name, (shape, dtype) in saved.items()
    }
    wanted_names = set(names)
    with ocp.PyTreeCheckpointer() as checkpointer:
        partial = {name: leaf for name, leaf in abstract.items() if name in wanted_names}
        arrays = checkpointer.restore(
            (checkpoint.path / "arrays").resolve(),
            args=ocp.args.PyTreeRestore(
                item=partial,
                restore_args=ocp.checkpoint_utils.construct_restore_args(partial),
                partial_restore=True,
            ),
        )
    return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in names])


def verify(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None where all are as they were written."""
    expected = checkpoint.manifest["files"]
    try:
        found = _digests(checkpoint.path)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    found.pop("manifest.json", None)
    for name in expected:
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected[name]:
            return f"{name} was changed"
    return None


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    keys = {"version", "step", "val_loss", "elapsed", "files", "leaves", "context"}
    whole = isinstance(manifest, dict) and keys <= set(manifest) and manifest["version"] == MANIFEST_VERSION
    return manifest if whole else None


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digests(folder: Path) -> dict[str, list[int | str]]:
    """Relative name -> [size, xxh3-128] of every file below a folder."""
    digests: dict[str, list[int | str]] = {}
    for path in _files(folder):
        digest = xxhash.xxh3_128()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        digests[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest.hexdigest()]
    return digests


def _sync(folder: Path) -> None:
    for path in (*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_cause(error: Exception) -> str | None:
    """Why the file system refused, if that is what happened; tensorstore reports it in the text of a ValueError."""
    if isinstance(error, OSError):
        return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
    text = str(error)
    if "No space left" in text or "ENOSPC" in text or "quota exceeded" in text.lower():
        return "the disk is full"
    return None

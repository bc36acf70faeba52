"""Check the folder of a run: read every array of every checkpoint, and repair what can be repaired.

A damaged checkpoint is renamed, never removed, and only if there is a good one. config.json is rewritten from a good
checkpoint, which holds a copy. What the system refuses to read is never changed.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.runs import manifest
from moe_jax.runs.arrays import read_arrays
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, verify
from moe_jax.runs.folder import RunFolder, new_run_id
from moe_jax.runs.load import saved_config
from moe_jax.runs.manifest import CheckpointCorrupted


@dataclass(frozen=True)
class Finding:
    """The result for one file or checkpoint."""

    what: str
    state: str
    """"good", "repaired", or one of ILL."""
    detail: str = ""


ILL = ("damaged", "unreadable")
"""States that are not good. Unreadable: the system refuses to read it, so nothing is known about it."""


def examine(run: Path, repair: bool) -> list[Finding]:
    """Check everything in the folder of a run. With `repair`, repair what can be repaired. Raises UserError if the
    folder cannot be written."""
    folder, store = RunFolder(run), CheckpointStore(run, say=lambda _: None)
    findings, good, damaged = [], [], {}
    for path in store.paths():
        try:
            good.append(_verified(path))
            loss = good[-1].val_loss
            scored = "not evaluated" if loss is None else f"loss {loss:.4f} on the validation subset"
            size = sum(size for size, _ in good[-1].manifest["files"].values()) / 1e6
            findings.append(Finding(path.name, "good", f"{scored}, {size:,.1f} MB"))
        except CheckpointCorrupted as error:
            damaged[path] = str(error)
        except OSError as error:
            cause = f"{error.filename or path}: cannot be read ({error.strerror}); fix that and try again"
            findings.append(Finding(path.name, "unreadable", cause))
    for path, cause in damaged.items():
        if repair and good:
            findings.append(Finding(path.name, "repaired", f"{cause}: now called {store.mark_damaged(path).name}"))
        else:
            findings.append(Finding(path.name, "damaged", cause))
    if left := store.interrupted_saves():
        if repair:
            store.remove_interrupted_saves()
        state = "repaired" if repair else "damaged"
        findings.append(Finding(", ".join(left), state, "left by a save that was interrupted"))
    newest = good[-1] if good else None
    for name, check in {"config.json": _config, folder.tokenizer.name: _tokenizer}.items():
        try:
            findings.append(Finding(name, *check(folder, newest, repair)))
        except OSError as error:
            findings.append(Finding(name, "unreadable", error.strerror or str(error)))
    return findings


def _verified(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every array of it read. Raises CheckpointCorrupted."""
    checkpoint = Checkpoint.read(path)
    if damage := verify(checkpoint):
        raise CheckpointCorrupted(damage)
    read_arrays(path, manifest.leaves_of(checkpoint.manifest))
    return checkpoint


def _saved_config(checkpoint: Checkpoint | None) -> RunConfig | None:
    """The configuration that a checkpoint holds, if it can be read."""
    with suppress(CheckpointCorrupted):
        return saved_config(checkpoint) if checkpoint else None
    return None


def _config(run: RunFolder, newest: Checkpoint | None, repair: bool) -> tuple[str, str]:
    try:
        RunConfig.from_dict(run.files.read_json("config.json"))
        return "good", ""
    except (FileNotFoundError, ValueError, UserError) as error:
        cause = str(error.strerror if isinstance(error, OSError) else error)
    saved = _saved_config(newest)
    if newest is None or saved is None:
        return "damaged", cause
    if not repair:
        return "damaged", f"{cause}; a good checkpoint holds a copy: --repair"
    run.write_config(saved, [], new_run_id())
    return "repaired", f"copied from {newest.path.name}; the history of resumes is lost"


def _tokenizer(run: RunFolder, newest: Checkpoint | None, repair: bool) -> tuple[str, str]:
    del repair  # no other file holds it
    expected = newest.manifest["context"].get("tokenizer") if newest else None
    with suppress(FileNotFoundError):
        run.files.read(run.tokenizer.name)  # raises OSError if it is there and cannot be read
    try:
        same = expected in (None, load_tokenizer(run.tokenizer).digest)
    except UserError as error:
        return "damaged", str(error)
    if same:
        return "good", ""
    return "damaged", "not the one that the checkpoints were trained with; put that one back"

"""Check the folder of a run: read every array of every checkpoint, and repair what can be repaired."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.data.token_store import prepare_token_store
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.runs import manifest, metrics
from moe_jax.runs.arrays import WEIGHTS, read_arrays, write_weights
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, verify
from moe_jax.runs.folder import RunFolder, RunLock
from moe_jax.runs.identity import check_same_run, checkpoint_run_id, new_run_id, read_run_id, saved_config
from moe_jax.runs.manifest import CheckpointCorrupted, CheckpointUnreadable
from moe_jax.system.folders import Folder


@dataclass(frozen=True)
class Finding:
    """The result for one file or checkpoint."""

    what: str
    state: str
    """"good", "repaired", or one of ILL."""
    detail: str = ""


ILL = ("damaged", "unreadable", "foreign")
"""States that are not good. Unreadable: the system refuses to read it, so nothing is known about it. Foreign: a
checkpoint of another run. Unreadable and foreign checkpoints are never changed."""


def examine(run: Path, repair: bool, lock: RunLock | None = None) -> list[Finding]:
    """Check everything in the folder of a run. With `repair`, repair what can be repaired.

    A file is rewritten only from an undamaged copy of its content. A damaged checkpoint is renamed only if there is a
    good checkpoint too. Raises UserError if the folder cannot be written, or if the folder's lock is not `lock` any
    more.
    """
    folder = RunFolder(run, lock.check) if lock else RunFolder(run)
    store = CheckpointStore(run, say=lambda _: None, guard=folder.guard)
    findings, good = [], []
    damaged: list[tuple[Path, str]] = []
    for path, found in store.list_all():
        cause = None
        try:
            cause = _damage(found)
            if isinstance(found, Checkpoint) and cause is not None and repair and _rebuild_weights(found):
                cause = _damage(found)
                findings.append(Finding(f"{path.name}/{WEIGHTS}", "repaired", "written anew from the arrays"))
        except CheckpointUnreadable as error:
            findings.append(Finding(path.name, "unreadable", str(error)))
            continue
        except OSError as error:  # the weights cannot be written, such as on a full disk: it may be repaired later
            findings.append(Finding(path.name, "damaged", f"{cause}; not repaired ({error.strerror or error})"))
            continue
        if isinstance(found, Checkpoint) and cause is None:
            good.append(found)
            loss = "not evaluated" if found.val_loss is None else f"loss {found.val_loss:.4f} on the validation subset"
            size = sum(size for size, _ in found.manifest["files"].values()) / 1e6
            foreign = _foreign(folder.files, good[0], found)
            findings.append(Finding(path.name, "foreign" if foreign else "good", foreign or f"{loss}, {size:,.1f} MB"))
        else:
            damaged.append((path, cause or ""))
    for path, cause in damaged:
        if repair and good:
            findings.append(Finding(path.name, "repaired", f"{cause}: now called {store.mark_damaged(path).name}"))
        else:
            findings.append(Finding(path.name, "damaged", cause))
    left = store.interrupted_saves()
    if left:
        if repair:
            store.remove_interrupted_saves()
        state = "repaired" if repair else "damaged"
        findings.append(Finding(", ".join(left), state, "left by a save that was interrupted"))
    newest = next((c for c in reversed(good) if not _foreign(folder.files, good[0], c)), None)
    return findings + _examine_files(folder, newest, repair)


def _examine_files(folder: RunFolder, newest: Checkpoint | None, repair: bool) -> list[Finding]:
    """The files beside the checkpoints. `newest` is the newest good checkpoint of the run."""
    findings = []
    checks = {"config.json": _config, folder.tokenizer.name: _tokenizer, metrics.NAME: _metrics}
    for name, check in checks.items():
        try:
            findings.append(check(folder, newest, repair))
        except OSError as error:
            findings.append(Finding(name, "unreadable", error.strerror or str(error)))
    return findings


def _foreign(run: Folder, oldest: Checkpoint, checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint does not belong to the folder's run. None if it does."""
    try:
        check_same_run(run, [checkpoint] if read_run_id(run) else [oldest, checkpoint])
    except (UserError, OSError) as error:
        return str(error) if isinstance(error, UserError) else None
    return None


def _damage(found: Checkpoint | CheckpointCorrupted | CheckpointUnreadable) -> str | None:
    """The first damage in a checkpoint, its arrays included. None if it is undamaged. Raises CheckpointUnreadable."""
    if isinstance(found, CheckpointUnreadable):
        raise found
    if isinstance(found, CheckpointCorrupted):
        return str(found)
    cause = verify(found)
    if cause is None:
        try:
            read_arrays(found.path, manifest.leaves_of(found.manifest))
        except CheckpointCorrupted as error:
            return str(error)
    return cause


def _rebuild_weights(checkpoint: Checkpoint) -> bool:
    """Rewrite the safetensors file from the arrays, if nothing else is damaged. Returns whether the checkpoint is now
    undamaged."""
    expected = checkpoint.manifest["files"].get(WEIGHTS)
    rest = {name: entry for name, entry in checkpoint.manifest["files"].items() if name != WEIGHTS}
    if expected is None or manifest.verify_files(checkpoint.path, {"files": rest}) is not None:
        return False
    try:
        arrays = read_arrays(checkpoint.path, manifest.leaves_of(checkpoint.manifest))
    except CheckpointCorrupted:
        return False
    (checkpoint.path / WEIGHTS).unlink(missing_ok=True)
    write_weights(checkpoint.path, arrays)
    return verify(checkpoint) is None


def _config(run: RunFolder, newest: Checkpoint | None, repair: bool) -> Finding:
    name = "config.json"
    try:
        RunConfig.from_dict(run.files.read_json(name))
        return Finding(name, "good")
    except (FileNotFoundError, ValueError, UserError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
    saved = _saved_config(newest)
    if newest is None or saved is None:
        return Finding(name, "damaged", cause or "")
    if not repair:
        return Finding(name, "damaged", f"{cause}; a good checkpoint holds a copy: --repair")
    run.write_config(saved, [], checkpoint_run_id(newest) or new_run_id())
    return Finding(name, "repaired", f"copied from {newest.path.name}; the history of resumes is lost")


def _saved_config(checkpoint: Checkpoint | None) -> RunConfig | None:
    """The configuration that a checkpoint holds, if it can be read."""
    try:
        return saved_config(checkpoint) if checkpoint else None
    except CheckpointCorrupted:
        return None


def _tokenizer(run: RunFolder, newest: Checkpoint | None, repair: bool) -> Finding:
    name = run.tokenizer.name
    expected = newest.manifest["context"].get("tokenizer") if newest else None
    with suppress(FileNotFoundError):
        run.files.read(name)  # raises OSError if it is there and cannot be read
    try:
        found = load_tokenizer(run.tokenizer)
        if expected in (None, found.digest):
            return Finding(name, "good")
        cause = "not the one that the checkpoints were trained with"
    except UserError as error:
        cause = str(error)
    saved = _saved_config(newest)
    if repair and saved is not None and saved.base:
        return _tokenizer_of_base(run, saved.base, expected, cause)
    if repair and saved is not None and saved.data.tokenizer != "hf":  # that one cannot be made from the data
        try:
            anew = prepare_token_store(saved.data).tokenizer
        except (ConfigError, UserError) as error:  # such as a text that is gone
            return Finding(name, "damaged", f"{cause}; it cannot be made again ({error})")
        if anew.digest == expected:
            run.save_tokenizer(anew)
            return Finding(name, "repaired", "made again from the data, and equal to the original")
        cause += "; a tokenizer made again from the data differs too"
    return Finding(name, "damaged", cause)


def _tokenizer_of_base(run: RunFolder, base: str, expected: str | None, cause: str) -> Finding:
    """Take the tokenizer of a tuned run from the run that it was tuned from."""
    name = run.tokenizer.name
    try:
        there = load_tokenizer(Path(base) / name)
    except UserError as error:
        return Finding(name, "damaged", f"{cause}; the run that it was tuned from has none either ({error})")
    if there.digest != expected:
        return Finding(name, "damaged", f"{cause}; that of {base} differs too")
    run.save_tokenizer(there)
    return Finding(name, "repaired", f"copied from {base}, where the run was tuned from")


def _metrics(run: RunFolder, newest: Checkpoint | None, repair: bool) -> Finding:
    found = list(metrics.record_lines(run.files))
    whole = [line.rstrip(b"\r\n") for line, record in found if record is not None]
    if len(whole) == len(found):
        return Finding(metrics.NAME, "good", f"{len(found):,} records")
    if repair:
        run.files.write(metrics.NAME, b"".join(line + b"\n" for line in whole))
    cut = f"{len(found) - len(whole)} of {len(found):,} lines are not records"
    return Finding(metrics.NAME, "repaired" if repair else "damaged", cut)

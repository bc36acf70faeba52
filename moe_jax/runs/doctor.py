"""Check the folder of a run: read every array of every checkpoint, and repair what can be repaired."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import RunConfig, UserError
from moe_jax.data.token_store import prepare_token_store
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import WEIGHTS, Checkpoint, CheckpointStore, read_arrays, verify, write_weights
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.files import write_atomically


@dataclass(frozen=True)
class Finding:
    """The result for one file or checkpoint."""

    what: str
    state: str
    """"good", "damaged", or "repaired"."""
    detail: str = ""


def examine(run: Path, repair: bool) -> list[Finding]:
    """Check everything in the folder of a run. With `repair`, repair what can be repaired.

    A file is rewritten only from an undamaged copy of its content. A damaged checkpoint is renamed only if there is a
    good checkpoint too. Raises UserError if the folder cannot be written.
    """
    store = CheckpointStore(run, say=lambda _: None)
    findings, good = [], []
    damaged: list[tuple[Path, str]] = []
    for path, found in store.list_all():
        cause = _damage(found)
        if isinstance(found, Checkpoint) and cause is not None and repair and _rebuild_weights(found):
            cause = _damage(found)
            findings.append(Finding(f"{path.name}/{WEIGHTS}", "repaired", "written anew from the arrays"))
        if isinstance(found, Checkpoint) and cause is None:
            good.append(found)
            loss = "not evaluated" if found.val_loss is None else f"loss {found.val_loss:.4f} on the validation subset"
            size = sum(size for size, _ in found.manifest["files"].values()) / 1e6
            findings.append(Finding(path.name, "good", f"{loss}, {size:,.1f} MB"))
        else:
            damaged.append((path, cause or ""))
    for path, cause in damaged:
        if repair and good:
            findings.append(Finding(path.name, "repaired", f"{cause}: now called {store.mark_damaged(path).name}"))
        else:
            findings.append(Finding(path.name, "damaged", cause))
    left = [p.name for p in store.folder.glob("tmp_*")]
    if left:
        if repair:
            store.remove_interrupted_saves()
        state = "repaired" if repair else "damaged"
        findings.append(Finding(", ".join(left), state, "left by a save that was interrupted"))
    newest = good[-1] if good else None
    return [*findings, _config(run, newest, repair), _tokenizer(run, newest, repair), _metrics(run, repair)]


def _damage(found: Checkpoint | CheckpointCorrupted) -> str | None:
    """The first damage in a checkpoint, its arrays included. None if it is undamaged."""
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


def _config(run: Path, newest: Checkpoint | None, repair: bool) -> Finding:
    path = run / "config.json"
    try:
        RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        return Finding(path.name, "good")
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        saved = _saved_config(newest)
        if newest is None or saved is None:
            return Finding(path.name, "damaged", str(error))
        if not repair:
            return Finding(path.name, "damaged", f"{error}; a good checkpoint holds a copy: --repair")
        document = saved | {"versions": newest.manifest["versions"], "history": []}
        write_atomically(path, json.dumps(document, indent=2) + "\n")
        return Finding(path.name, "repaired", f"copied from {newest.path.name}; the history of resumes is lost")


def _saved_config(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """The configuration that a checkpoint holds, if it can be read."""
    saved: Any = checkpoint.manifest["context"].get("config") if checkpoint else None
    try:
        RunConfig.from_dict(saved)
    except (ValueError, TypeError, AttributeError, UserError):
        return None
    return saved


def _tokenizer(run: Path, newest: Checkpoint | None, repair: bool) -> Finding:
    path = RunFolder(run).tokenizer
    expected = newest.manifest["context"].get("tokenizer") if newest else None
    try:
        found = load_tokenizer(path)
        if expected in (None, found.digest):
            return Finding(path.name, "good")
        cause = "not the one that the checkpoints were trained with"
    except UserError as error:
        cause = str(error)
    saved = _saved_config(newest)
    if repair and saved is not None:
        anew = prepare_token_store(RunConfig.from_dict(saved).data).tokenizer
        if anew.digest == expected:
            anew.save(path)
            return Finding(path.name, "repaired", "made again from the data, and equal to the original")
        cause += "; a tokenizer made again from the data differs too"
    return Finding(path.name, "damaged", cause)


def _metrics(run: Path, repair: bool) -> Finding:
    path = RunFolder(run).metrics
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    whole = [line for line in lines if _is_record(line)]
    if len(whole) == len(lines):
        return Finding(path.name, "good", f"{len(lines):,} records")
    if repair:
        write_atomically(path, "".join(line + "\n" for line in whole))
    cut = f"{len(lines) - len(whole)} of {len(lines):,} lines are not records"
    return Finding(path.name, "repaired" if repair else "damaged", cut)


def _is_record(line: str) -> bool:
    try:
        return {"step", "split"} <= set(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return False

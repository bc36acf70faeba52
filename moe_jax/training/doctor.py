"""The health of a run's folder: every checkpoint read to the last array, and what can be repaired."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import RunConfig, UserError
from moe_jax.data.token_store import prepare
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.training import manifest
from moe_jax.training.checkpoint import WEIGHTS, Checkpoint, CheckpointStore, read_arrays, verify, write_weights
from moe_jax.training.manifest import Damaged
from moe_jax.training.run import RunFolder, write_atomically


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    """"good", "damaged", or "repaired"."""
    detail: str = ""


def examine(run: Path, repair: bool) -> list[Finding]:
    """Look at everything in the folder of a run; with `repair`, mend what can be mended.

    Only what is whole elsewhere is written anew; damaged checkpoints are renamed, and only beside a good one. Raises
    UserError where the folder cannot be written.
    """
    store = CheckpointStore(run, say=lambda _: None)
    findings, good = [], []
    damaged: list[tuple[Path, str]] = []
    for path, found in store.survey():
        cause = _damage(found)
        if isinstance(found, Checkpoint) and cause is not None and repair and _rebuild_weights(found):
            cause = _damage(found)
            findings.append(Finding(f"{path.name}/{WEIGHTS}", "repaired", "written anew from the arrays"))
        if isinstance(found, Checkpoint) and cause is None:
            good.append(found)
            loss = "not evaluated" if found.val_loss is None else f"validation loss {found.val_loss:.4f}"
            size = sum(size for size, _ in found.manifest["files"].values()) / 1e6
            findings.append(Finding(path.name, "good", f"{loss}, {size:,.1f} MB"))
        else:
            damaged.append((path, cause or ""))
    for path, cause in damaged:
        if repair and good:
            findings.append(Finding(path.name, "repaired", f"{cause}: now called {store.set_aside(path).name}"))
        else:
            findings.append(Finding(path.name, "damaged", cause))
    left = [p.name for p in store.folder.glob("tmp_*")]
    if left:
        if repair:
            store.sweep()
        state = "repaired" if repair else "damaged"
        findings.append(Finding(", ".join(left), state, "left by a save that was interrupted"))
    newest = good[-1] if good else None
    return [*findings, _config(run, newest, repair), _tokenizer(run, newest, repair), _metrics(run, repair)]


def _damage(found: Checkpoint | Damaged) -> str | None:
    """What is wrong with a checkpoint, its arrays included; None where it is whole."""
    if isinstance(found, Damaged):
        return str(found)
    cause = verify(found)
    if cause is None:
        try:
            read_arrays(found.path, manifest.leaves_of(found.manifest))
        except Damaged as error:
            return str(error)
    return cause


def _rebuild_weights(checkpoint: Checkpoint) -> bool:
    """Write the safetensors file from the arrays, where it is all that is damaged."""
    expected = checkpoint.manifest["files"].get(WEIGHTS)
    rest = {name: entry for name, entry in checkpoint.manifest["files"].items() if name != WEIGHTS}
    if expected is None or manifest.verify_files(checkpoint.path, {"files": rest}) is not None:
        return False
    try:
        arrays = read_arrays(checkpoint.path, manifest.leaves_of(checkpoint.manifest))
    except Damaged:
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
        saved: Any = newest.manifest["context"].get("config") if newest else None
        if not (repair and newest and isinstance(saved, dict)):
            return Finding(path.name, "damaged", f"{error}; a good checkpoint holds a copy: --repair")
        document = saved | {"versions": newest.manifest["versions"], "history": []}
        write_atomically(path, json.dumps(document, indent=2) + "\n")
        return Finding(path.name, "repaired", f"taken from {newest.path.name}; what changed at resumes is lost")


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
    if repair and newest and isinstance(newest.manifest["context"].get("config"), dict):
        config = RunConfig.from_dict(newest.manifest["context"]["config"])
        anew = prepare(config.data).tokenizer
        if anew.digest == expected:
            anew.save(path)
            return Finding(path.name, "repaired", "made anew from the data, and equal to what it was")
        cause += "; made anew from the data it is another one"
    return Finding(path.name, "damaged", cause)


def _metrics(run: Path, repair: bool) -> Finding:
    path = RunFolder(run).metrics
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    whole = [line for line in lines if _is_record(line)]
    if len(whole) == len(lines):
        return Finding(path.name, "good", f"{len(lines):,} records")
    if repair:
        write_atomically(path, "".join(line + "\n" for line in whole))
    cut = f"{len(lines) - len(whole)} of {len(lines):,} lines are no records"
    return Finding(path.name, "repaired" if repair else "damaged", cut)


def _is_record(line: str) -> bool:
    try:
        return {"step", "split"} <= set(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return False

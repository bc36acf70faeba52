"""Verify the folder of a run: compare every file of every checkpoint with its digest. Nothing is written."""

from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import RunConfig, UserError
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, verify
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.manifest import CheckpointCorrupted
from moe_jax.system.files import read_json


@dataclass(frozen=True)
class Finding:
    """The result for one file or checkpoint."""

    what: str
    state: str
    """"good" or "damaged"."""
    detail: str = ""


def examine(run: Path) -> list[Finding]:
    """Verify everything in the folder of a run. Raises OSError if the system refuses to read a file."""
    findings, newest = [], None
    for path in CheckpointStore(run).paths():
        try:
            checkpoint = Checkpoint.read(path)
            damage = verify(checkpoint)
        except CheckpointCorrupted as error:
            damage = str(error)
        else:
            newest = checkpoint if damage is None else newest
        findings.append(Finding(path.name, "damaged", damage) if damage else Finding(path.name, "good", _about(newest)))
    folder = RunFolder(run)
    for name, damage in {"config.json": _config(run), folder.tokenizer.name: _tokenizer(folder, newest)}.items():
        findings.append(Finding(name, "damaged" if damage else "good", damage))
    return findings


def _about(checkpoint: Checkpoint | None) -> str:
    assert checkpoint is not None
    loss = checkpoint.val_loss
    scored = "not evaluated" if loss is None else f"loss {loss:.4f} on the validation subset"
    size = sum(size for size, _ in checkpoint.manifest["files"].values()) / 1e6
    return f"{scored}, {size:,.1f} MB"


def _config(run: Path) -> str:
    try:
        RunConfig.from_dict(read_json(run / "config.json"))
    except FileNotFoundError:
        return "is missing"
    except (ValueError, UserError) as error:
        return str(error)
    return ""


def _tokenizer(run: RunFolder, newest: Checkpoint | None) -> str:
    expected = newest.context.get("tokenizer") if newest else None
    try:
        same = expected in (None, load_tokenizer(run.tokenizer).digest)
    except UserError as error:
        return str(error)
    return "" if same else "not the one that the checkpoints were trained with; put that one back"

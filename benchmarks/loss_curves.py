"""Final losses of runs that differ in one setting: the precision, the optimizer, the dtype of the weights, the seed.

    uv run benchmarks/loss_curves.py precision     nano, 200 steps: float32, bfloat16, float16
    uv run benchmarks/loss_curves.py optimizers    story, 300 steps: AdamW, three optimizers with less state, and Muon
    uv run benchmarks/loss_curves.py weights       story, 300 steps: float32 and bfloat16 weights, with Adafactor
    uv run benchmarks/loss_curves.py seeds         story, 300 steps: AdamW with three seeds, to show the noise

All runs read the same batches of the embedded stories; only in the suite `seeds` each run has its own batches. The last
line is JSON.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.cli import main
from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.presets import preset
from moe_jax.system import environment

SUITES: dict[str, tuple[str, int, list[dict[str, Any]]]] = {
    "precision": ("nano", 200, [{"compute_dtype": p} for p in ("float32", "bfloat16", "float16")]),
    "optimizers": (
        "story",
        300,
        [{"optimizer": o} for o in ("adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon")],
    ),
    "weights": ("story", 300, [{"optimizer": "adafactor", "param_dtype": w} for w in ("float32", "bfloat16")]),
    "seeds": ("story", 300, [{"optimizer": "adamw", "seed": s} for s in range(3)]),
}
"""Preset, steps, and the changes of each run. The other runs are compared with the first run."""
LAST = 50
"""The training loss is averaged over this many last steps."""


def configure(name: str, steps: int, changes: dict[str, Any], out: Path) -> RunConfig:
    """One run of a suite. `changes` are fields of `TrainConfig` or of `ExecutionConfig`."""
    config = preset(name)
    data = dataclasses.replace(config.data, source="stories")
    of_execution = {f.name for f in dataclasses.fields(config.execution)}
    execution = dataclasses.replace(config.execution, **{k: v for k, v in changes.items() if k in of_execution})
    changes = {k: v for k, v in changes.items() if k not in of_execution}
    train = dataclasses.replace(config.train, steps=steps, log_every=1, eval_every=steps, save_every=steps, **changes)
    return dataclasses.replace(config, out=str(out), data=data, train=train, execution=execution)


def measure(config: RunConfig) -> dict[str, float]:
    """Train. Returns the mean training loss of the last steps, the validation loss, and the number of skipped steps."""
    from moe_jax.training.loop import finish, train
    from moe_jax.training.session import Session

    session = Session.open(config)
    train(session)
    records = [json.loads(line) for line in (session.folder.path / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["split"] == "train"][-LAST:]
    return {
        "train_loss": sum(losses) / len(losses),
        "val_loss": finish(session)["val_loss"],
        "skipped_steps": int(session.state.skipped),
    }


def run(argv: Sequence[str]) -> None:
    if len(argv) != 1 or argv[0] not in SUITES:
        raise ConfigError(f"{' '.join(argv) or 'no argument'}: must be one of {', '.join(SUITES)}")
    environment.prepare_environment()
    name, steps, variants = SUITES[argv[0]]
    results: dict[str, dict[str, float]] = {}
    for changes in variants:
        label = " ".join(str(value) for value in changes.values())
        with tempfile.TemporaryDirectory() as folder:
            results[label] = measure(configure(name, steps, changes, Path(folder) / "run"))
    first = next(iter(results.values()))
    print(f"\n{name}, {steps} steps; training loss is the mean of the last {LAST}")
    for label, result in results.items():
        ratio = result["val_loss"] / first["val_loss"] - 1
        print(
            f"{label:<22} train {result['train_loss']:.4f}  validation {result['val_loss']:.4f} ({ratio:+.2%})  "
            f"skipped {result['skipped_steps']}"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main.main(run))

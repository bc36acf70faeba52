"""Loss curves that differ in one setting of how numbers are kept: the precision, the optimizer's state, the weights.

    uv run benchmarks/loss_curves.py precision     nano, 200 steps: float32, bfloat16, float16
    uv run benchmarks/loss_curves.py optimizers    story, 300 steps: AdamW and those with less state
    uv run benchmarks/loss_curves.py weights       story, 300 steps: float32 and bfloat16 weights, with Adafactor
    uv run benchmarks/loss_curves.py seeds         story, 300 steps: AdamW with three seeds, which is the noise

All runs see the same batches of the embedded stories, except that a seed has its own. The last line is JSON.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax import cli, environment
from moe_jax.config import ConfigError, RunConfig
from moe_jax.presets import preset

SUITES: dict[str, tuple[str, int, list[dict[str, Any]]]] = {
    "precision": ("nano", 200, [{"precision": p} for p in ("float32", "bfloat16", "float16")]),
    "optimizers": (
        "story",
        300,
        [{"optimizer": o} for o in ("adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon")],
    ),
    "weights": ("story", 300, [{"optimizer": "adafactor", "weights": w} for w in ("float32", "bfloat16")]),
    "seeds": ("story", 300, [{"optimizer": "adamw", "seed": s} for s in range(3)]),
}
"""Preset, steps, and what each run changes; the first run is what the others are compared with."""
LAST = 50
"""Steps at the end whose training loss is averaged."""


def configure(name: str, steps: int, changes: dict[str, Any], out: Path) -> RunConfig:
    config = preset(name)
    data = dataclasses.replace(config.data, source="stories")
    train = dataclasses.replace(config.train, steps=steps, log_every=1, eval_every=steps, save_every=steps, **changes)
    return dataclasses.replace(config, out=str(out), data=data, train=train)


def measure(config: RunConfig) -> dict[str, float]:
    """Train; the mean training loss of the last steps and the loss on the whole validation stream."""
    from moe_jax.training.loop import Session, finish, train

    session = Session.open(config, None)
    train(session)
    records = [json.loads(line) for line in session.folder.metrics.read_text().splitlines()]
    losses = [r["loss"] for r in records if r["split"] == "train"][-LAST:]
    return {
        "train_loss": sum(losses) / len(losses),
        "val_loss": finish(session)["val_loss"],
        "skipped_steps": int(session.state.skipped),
    }


def run(argv: Sequence[str]) -> None:
    if len(argv) != 1 or argv[0] not in SUITES:
        raise ConfigError(f"{' '.join(argv) or 'no argument'}: must be one of {', '.join(SUITES)}")
    environment.prepare()
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
    sys.exit(cli.main(run))

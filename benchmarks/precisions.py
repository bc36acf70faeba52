"""Which precision trains faster on this machine? A training step in float32 and in bfloat16, in turn, in one process.

    uv run benchmarks/precisions.py                   nano, story-cpu and seed-158m
    uv run benchmarks/precisions.py nano --rounds 3

`--precision auto` follows such measurements (`moe_jax/model/precision.py`).
"""

import argparse
import dataclasses

from moe_jax.config import ComputeDtype, RunConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system.machine import alternate
from moe_jax.training.programs import RandomTokenTrainer

PRECISIONS: tuple[ComputeDtype, ...] = ("float32", "bfloat16")
SEQUENCES = 8


def trainer(config: RunConfig, precision: ComputeDtype) -> RandomTokenTrainer:
    """A training step of 8 sequences of random tokens."""
    execution = dataclasses.replace(config.execution, compute_dtype=precision)
    return RandomTokenTrainer.of(dataclasses.replace(config, execution=execution), SEQUENCES)


def main() -> None:
    """Measure, and print a line for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["nano", "story-cpu", "seed-158m"])
    parser.add_argument("--rounds", type=int, default=7, help="how often each step runs")
    given = parser.parse_args()
    for name in given.presets:
        config = with_vocabulary(preset(name))
        times = alternate({precision: trainer(config, precision) for precision in PRECISIONS}, given.rounds)
        wide, narrow = (times[precision].median for precision in PRECISIONS)
        print(f"{name}: float32 {wide:.3f} s, bfloat16 {narrow:.3f} s, ratio {narrow / wide:.2f}", flush=True)


if __name__ == "__main__":
    main()

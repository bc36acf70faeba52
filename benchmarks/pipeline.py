"""The work around the training step: tokenizing, batches, saving and restoring a checkpoint.

    uv run python benchmarks/pipeline.py --preset seed-158m

A state is written in two ways, in turn. A plain `write` with `fsync` shows the speed of the disk. A checkpoint also
writes the weights a second time, syncs, computes every digest, and reads everything back. Then the checkpoint is
restored, which verifies it first. The results are medians over the rounds. Files are written below TMPDIR.
"""

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from moe_jax.benchmarks.request import print_numbers, times_table
from moe_jax.cli.main import main
from moe_jax.config import DataConfig, RunConfig, UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.data.batches import train_positions
from moe_jax.data.corpora import open_corpus
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer
from moe_jax.runs.checkpoint import CheckpointStore, restore
from moe_jax.system.files import json_text
from moe_jax.system.machine import alternate
from moe_jax.training.programs import Programs

CORPUS = DataConfig(source="stories", tokenizer="bpe", vocab_size=2048, stories=4000)
"""About 2 MB of the embedded stories, so that nothing is downloaded."""
STREAM = 2**24
"""Length in tokens of the stream from which batches are taken."""


def tokenizers() -> dict[str, Tokenizer]:
    """The tokenizers by name. GPT-2 is left out if its vocabulary cannot be loaded."""
    corpus = open_corpus(CORPUS)
    known = {
        "bytes": train_tokenizer(DataConfig(tokenizer="byte")),
        f"BPE of {CORPUS.vocab_size}": train_tokenizer(CORPUS, corpus.documents("train")),
    }
    try:
        return known | {"GPT-2": train_tokenizer(DataConfig(tokenizer="gpt2"))}
    except UserError:
        return known


def batch_call(config: RunConfig, batch_size: int) -> Callable[[], Any]:
    """Each call makes the next batch of a training run. The order of the windows is new in each epoch."""
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, STREAM).astype(np.uint16)
    steps = itertools.count()

    def call() -> np.ndarray:
        where = train_positions(STREAM, seed=0, step=next(steps), batch_size=batch_size, seq_len=config.model.seq_len)
        return tokens[where].astype(np.int32)

    return call


def make_state(config: RunConfig) -> Any:
    """A train state with the configuration's shapes and dtypes, filled with noise, which cannot be compressed."""
    rng = np.random.default_rng(0)

    def noise(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

    return jax.tree.map(noise, Programs.of(config).state_shapes)


def measure(state: Any, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds and GB of each way of writing the state below `folder`, and median seconds of restoring it.

    A restore reads files that the operating system still holds in memory.
    """
    store = CheckpointStore(folder / "run")
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    seconds: dict[str, list[float]] = {"disk": [], "save": [], "restore": []}
    written: dict[str, int] = {}
    for step in range(1, rounds + 1):
        seconds["disk"].append(_clocked(lambda: _write_plainly(state, folder / "plain")))
        written["disk"] = _remove(folder / "plain")
        save = partial(store.save, state, step, val_loss=None, elapsed=0.0, context={})
        seconds["save"].append(_clocked(save))
        seconds["restore"].append(_clocked(partial(restore, store.at(step), target)))
        written["save"] = _remove(store.folder)
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    sizes = {f"{name}_GB": size / 1e9 for name, size in written.items()}
    rates = {f"{name}_seconds_per_GB": medians[f"{name}_seconds"] / size * 1e9 for name, size in written.items()}
    return medians | sizes | rates


def _clocked(work: Callable[[], object]) -> float:
    os.sync()  # earlier writes have reached the disk before the clock starts
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _write_plainly(state: Any, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for leaf in jax.tree.leaves(state):
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _remove(path: Path) -> int:
    """Remove a file or a folder. Returns its size in bytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = sum(file.stat().st_size for file in files)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return size


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the model")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--rounds", type=int, default=9, help="how often each candidate runs; a third of it for saves")
    asked = parser.parse_args(argv)
    config, console = with_vocabulary(preset(asked.preset)), Console()
    texts = list(open_corpus(CORPUS).documents("train"))
    size = sum(len(text.encode()) for text in texts)
    calls: dict[str, Callable[[], Any]] = {
        f"tokenizing, {name}": partial(tokenizer.encode_batch, texts) for name, tokenizer in tokenizers().items()
    }
    times = alternate(calls | {"a batch": batch_call(config, asked.batch_size)}, asked.rounds)
    console.print(times_table(f"{len(texts):,} stories of {size / 1e6:.1f} MB; and one batch", times))
    numbers = {f"{name} MB per second": size / 1e6 / times[name].median for name in calls}
    numbers["batch_ms"] = 1e3 * times["a batch"].median
    with tempfile.TemporaryDirectory() as folder:
        numbers |= measure(make_state(config), Path(folder), max(1, asked.rounds // 3))
    print_numbers(console, numbers)
    print(json_text(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))

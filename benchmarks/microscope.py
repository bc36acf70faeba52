"""What it costs to import a public mixture and to write with it, on this machine.

    uv run python benchmarks/public_shapes.py olmoe models/olmoe
    uv run python benchmarks/microscope.py models/olmoe int4

Three rates in turn: reading the folder's tensors and nothing else, rounding parts that are in memory, and the import,
which does both and writes. Then the run: seconds to read a prompt of 64 and of 512 tokens, and for a token. Of each the
median. Memory is the peak of the whole process.
"""

import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from moe_jax.inference.decode import Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.interop.imported_run import Form, import_run, rounded_part
from moe_jax.interop.pretrained import Pretrained
from moe_jax.runs.load import open_run
from moe_jax.system.machine import processor

PARTS = 400


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The median of some calls, after one that compiles."""
    jax.block_until_ready(work())
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak() -> float:
    """GB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def importing(folder: Path, form: Form, out: Path) -> dict[str, float]:
    """Rates in MB of the folder's bytes a second."""
    model = Pretrained.open(folder, "SOURCE")
    table = model.table()
    began = time.perf_counter()
    size = sum(part.stored.nbytes for part in model.read(table, xxhash.xxh3_128()))
    reads = size / (time.perf_counter() - began)
    matrices = (part for part in model.read(table, xxhash.xxh3_128()) if part.stored.ndim > 1)
    parts = list(islice(matrices, PARTS))
    rounds = sum(part.stored.nbytes for part in parts) / seconds(
        lambda: [rounded_part(part.stored, part.piece.factor, "int4" if form == "int4" else "int8") for part in parts]
    )
    began = time.perf_counter()
    import_run(model, form, 1024, out)
    both = size / (time.perf_counter() - began)
    rates = {"read": reads, "round": rounds, "import": both, "import / slower": both / min(reads, rounds)}
    return {name: rate / 1e6 if rate > 1e3 else rate for name, rate in rates.items()} | {"import, peak GB": peak()}


def writing(out: Path) -> dict[str, float]:
    run = open_run(out)
    params = cast_once(run.writer, run.params)
    decoder = Decoder(run.writer, run.config.model.seq_len, run.tokenizer.vocab_size, short_prompts=True)
    tokens = np.random.default_rng(0).integers(0, run.tokenizer.vocab_size, 512).tolist()
    text = [decoder.start(params, tokens[:64], [], Sampling(), jax.random.key(0))]

    def write() -> Any:
        text[0], drawn, _ = decoder.write(params, text[0], np.int32(8), np.int32(-1))
        return drawn

    result = {"token, s": seconds(write, 9) / 8, "prompt of 64, s": seconds(lambda: decoder.read(params, tokens[:64]))}
    result["writing, peak GB"] = peak()
    prompts = Decoder(run.writer, 512, run.tokenizer.vocab_size)
    return result | {"prompt of 512, s": seconds(lambda: prompts.read(params, tokens)), "prompts, peak GB": peak()}


if __name__ == "__main__":
    source, form = Path(sys.argv[1]), sys.argv[2]
    out = source.with_name(f"{source.name}-{form}-measured")
    shutil.rmtree(out, ignore_errors=True)
    found = importing(source, form, out)  # pyright: ignore[reportArgumentType]
    found |= writing(out)
    shutil.rmtree(out)
    print(json.dumps({"processor": processor(), "form": form} | {name: round(v, 3) for name, v in found.items()}))

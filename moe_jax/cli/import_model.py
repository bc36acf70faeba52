"""`moe-jax import`: a public model, to talk to and to look into."""

import shlex
import time
from pathlib import Path
from typing import Literal

import tyro

from moe_jax.cli.options import check_out_folder, check_range, starting
from moe_jax.system.terminal import say, working


def import_model(
    source: tyro.conf.Positional[str],
    weights: Literal["int4", "int8", "bfloat16"] = "int4",
    context: int = 1024,
    out: str = "",
) -> int:
    """Bring a public mixture of experts here as a run: to talk to, to serve, to inspect and to evaluate.

    The weights are rounded while they are read, tensor by tensor, so a model that is much larger than the memory can be
    imported. The run has no state of an optimizer: to train a model, start from its folder by `train.py --init-from`.

    Args:
        source: Folder of a model in Hugging Face's layout; or OWNER/NAME, which is downloaded from the hub.
        weights: Bits of a weight: 4.5, 8 or 16, scales included.
        context: Most tokens that the run reads. The memory for keys and values grows with it.
        out: The folder of the run. Empty: runs/NAME, after the source.
    """
    check_range("--context", context, 2, 2**20)
    name = Path(source).resolve().name if Path(source).is_dir() else source.rpartition("/")[2]
    target = Path(out or f"runs/{name.lower()}")
    check_out_folder("--out", target, new=True)
    with starting(f"opening {source}"):
        from moe_jax.interop.imported_run import import_run
        from moe_jax.interop.pretrained import Pretrained
        from moe_jax.interop.pretrained_shape import model_folder

    folder = model_folder(source)
    with working(f"opening {folder}"):
        model = Pretrained.open(folder, "SOURCE")
    began = time.perf_counter()
    made = import_run(model, weights, context, target)
    seconds = time.perf_counter() - began
    count = made.parameters
    say(f"{target}: {made.model_type}, {count.total / 1e6:,.0f} M parameters, {count.active / 1e6:,.0f} M for a token")
    rate = f"{made.bytes_read / seconds / 1e6:,.0f} MB/s"
    say(f"read {made.bytes_read / 1e9:.2f} GB, wrote {made.bytes_written / 1e9:.2f} GB: {seconds:.0f} s, {rate}")
    print(f"next: uv run moe-jax chat --run {shlex.quote(str(target))}")
    return 0

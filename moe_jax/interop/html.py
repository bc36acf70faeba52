"""One page with the model inside: weights of 8 bits, the tokenizer, and a forward pass in plain JavaScript.

It is the live page (`moe_jax.pages.live`) with a worker that writes (`page/`):

    model.js      the forward pass of one token, with a cache
    tokenizer.js  text to ids and back
    worker.js     reads the file's weights, and writes texts
    local.js      brings the worker's tokens to the page
    switches.js   experts that are switched off

Weights and tokenizer are one zlib stream: the length of a header (uint32), the header (JSON), and the tensors, each at
a multiple of 4 bytes. Base64 would make them a third larger. So the document is in windows-1252, where every byte is
a character. All else in it is ASCII.
"""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ConfigError, UserError
from moe_jax.model.quantized import quantize
from moe_jax.pages import ascii_script, page_file
from moe_jax.pages.live import live_page, model_entry
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.load import LoadedRun, find_checkpoint, open_run, saved_weights
from moe_jax.runs.records import read_summary
from moe_jax.system.errors import disk_cause
from moe_jax.system.files import json_text, write_output

PACKAGE = "moe_jax.interop"
ESCAPED = {b"=": b"=}", b"\0": b"=@", b"\r": b"=M", b"<": b"=|"}
"""Bytes that a browser would change, or that could end the element; and "=", which stands before each. The second byte
is the first plus 64."""


def write_html(run: Path, out: Path, step: int | None = None) -> None:
    """Write the page of a run's best checkpoint, or of a step's. The file is whole or absent.

    Raises ConfigError for a run that a page cannot hold, the errors of `open_run`, and UserError where the file cannot
    be written.
    """
    config, tokenizer, checkpoint = find_checkpoint(run, step)
    if config.model.rope_scaling or config.model.multiplied:
        missing = "scaled rotation (model.rope_scaling)" if config.model.rope_scaling else "multipliers (of Granite)"
        raise ConfigError(f"--to html: the page has no {missing}; take --to hf")
    if tokenizer.kind not in ("byte", "bpe"):
        raise ConfigError(f"--to html: the page has no {tokenizer.kind} tokenizer, only byte and bpe; take --to hf")
    if saved_weights(checkpoint) == "int4":
        raise ConfigError(f"--run {run}: its weights are int4, and a page holds int8; name the run that it was made of")
    page = html_page(open_run(run, step), run.resolve().name, read_summary(run))
    try:
        write_output(out, page)
    except OSError as error:
        cause = disk_cause(error) or error.strerror
        raise UserError(f"--out {out}: cannot be written ({cause}); nothing was exported") from None


def html_page(run: LoadedRun, name: str, summary: dict[str, Any]) -> bytes:
    """The page. Weights that are not int8 yet are rounded as `quantize` rounds them."""
    worker = ascii_script("\n".join(_script(part) for part in ("tokenizer", "model", "worker")))
    packed = zlib.compress(_packed(run, name, summary), 9)
    for byte, escape in ESCAPED.items():
        packed = packed.replace(byte, escape)
    data = (
        f'<script type="text/plain" id="worker">{worker}</script>\n'
        f'<script type="application/octet-stream" id="weights">{packed.decode("latin-1")}</script>\n'
    )
    transport = "\n".join(_script(part) for part in ("local", "switches"))
    policy = "connect-src 'self'", "worker-src blob:"
    return live_page(transport, *policy, charset="windows-1252", data=data)[0].encode("latin-1")


def _script(name: str) -> str:
    return page_file(PACKAGE, f"page/{name}.js")


def _packed(run: LoadedRun, name: str, summary: dict[str, Any]) -> bytes:
    """Header and tensors. Of a matrix, the weights of an output stand together: `[*E, outputs, inputs]`."""
    tensors, parts, at = [], [], 0
    for path, leaf in named_leaves(quantize(run.params, "int8")).items():
        array = np.asarray(leaf)
        if path.endswith((".codes", ".router")):
            array = array.swapaxes(-1, -2)
        array = np.ascontiguousarray(array, np.int8 if path.endswith(".codes") else np.float32)
        tensors.append([path, array.dtype.name, array.shape, at])
        parts.append(array.tobytes() + bytes(-array.nbytes % 4))
        at += len(parts[-1])
    tokenizer = run.tokenizer
    header = {
        "entry": model_entry(name, run.config, tokenizer.vocab_size, summary),
        "model": run.config.to_dict()["model"] | {"routing": run.config.to_dict()["routing"]},
        "tokenizer": tokenizer.to_dict(),
        "tensors": tensors,
    }
    text = json_text(header).encode()
    text += b" " * (-len(text) % 4)
    return b"".join([struct.pack("<I", len(text)), text, *parts])

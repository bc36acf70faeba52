"""A public model as a run, to read and not to train: the weights of a Hugging Face folder, rounded while they are read.

The parts of a tensor are read, rounded and written one after another. So the memory that is needed does not grow with
the model: two parameters in their new form, one of them being written, and a few parts. The folder of the run is whole
or absent.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from moe_jax.config import RunConfig
from moe_jax.config.presets import preset
from moe_jax.interop.pretrained import Part, Pretrained
from moe_jax.model.costs import Count, count_parameters, totals
from moe_jax.model.quantized import QuantizedMatrix, Weights, quantized_shapes, rounded
from moe_jax.model.transformer import abstract_model
from moe_jax.runs.arrays import WEIGHTS, SafetensorsWriter, named_leaves
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.folder import RunFolder
from moe_jax.system.files import out_folder
from moe_jax.system.terminal import progress_bar

Form = Literal["int4", "int8", "bfloat16"]


class ImportedRun(NamedTuple):
    """What an import has made."""

    model_type: str
    parameters: Count
    bytes_read: int
    bytes_written: int


def import_run(model: Pretrained, form: Form, context: int, out: Path) -> ImportedRun:
    """Write a model as a run into the new folder `out`. The run reads at most `context` tokens.

    Raises UserError if a value is not finite, a matrix cannot be kept in this form, or the disk is full. Nothing is
    left then.
    """
    config = _config(model, form, context)
    quantized: Weights | None = None if form == "bfloat16" else form
    shapes = abstract_model(config.model, param_dtype=config.train.param_dtype)[1]
    shapes = quantized_shapes(shapes, quantized) if quantized else shapes
    origin: dict[str, Any] = {"imported_from": config.init_from, "model_type": model.shape.architecture.model_type}
    context_of_run = {"tokenizer": model.tokenizer.digest, "config": config.to_dict(), "origin": origin}
    if quantized:
        context_of_run["quantized"] = {"weights": quantized, "made_from": config.init_from}
    counts = totals(count_parameters(config.model))
    summary = {"preset": origin["model_type"], "steps": 0, "params_total": counts.total, "params_active": counts.active}

    def write(folder: Path) -> None:
        digest = xxhash.xxh3_128(model.shape.text + model.tokenizer.digest.encode())
        _write_weights(model, shapes, quantized, folder, digest)
        origin["digest"] = digest.hexdigest()

    with out_folder(out, "imported") as draft:
        folder = RunFolder(draft)
        folder.save_tokenizer(model.tokenizer)
        CheckpointStore(draft).save_weights(write, 0, elapsed=0.0, context=context_of_run)
        folder.start(config, model.tokenizer, [origin])
        folder.write_summary(summary | {"weights": form})
    written = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return ImportedRun(origin["model_type"], counts, model.size(), written)


def _config(model: Pretrained, form: Form, context: int) -> RunConfig:
    config = preset("nano")
    return dataclasses.replace(
        config,
        init_from=str(model.shape.folder.resolve()),
        model=dataclasses.replace(model.shape.model, seq_len=min(context, model.shape.model.seq_len)),
        # A text to score is at hand. Nothing is trained, so its training part is small.
        data=dataclasses.replace(config.data, tokenizer="hf", stories=100),
        train=dataclasses.replace(config.train, param_dtype="bfloat16" if form == "bfloat16" else "float32"),
    )


def _write_weights(
    model: Pretrained, shapes: Any, quantized: Weights | None, folder: Path, digest: xxhash.xxh3_128
) -> None:
    """Write the parameters of `shapes`."""
    table, leaves = model.table(), named_leaves(shapes)
    # The writer is told the order of the arrays: that of the table, and of a quantised matrix the codes first.
    arrays = {full: leaves[full] for name in table for full in _stored_names(name, leaves)}
    progress = progress_bar(f"importing {model.shape.folder.name}", model.size(), of_bytes=True)
    with SafetensorsWriter(folder / WEIGHTS, arrays) as writer, ThreadPoolExecutor(1) as thread, progress as advance:
        written: list[Future[None]] = []
        for name, parts in groupby(model.read(table, digest), lambda part: part.parameter):
            made = [np.empty(leaves[full].shape, leaves[full].dtype) for full in _stored_names(name, leaves)]
            if len(made) > 1 and quantized:
                rounding = ((part, rounded_part(part.stored, quantized)) for part in parts)
                for part, matrix in _one_ahead(rounding):
                    _put_rounded(model, part, made, matrix)
                    advance(part.stored.nbytes)
            else:
                for part in parts:
                    model.fill(made[0], part)
                    advance(part.stored.nbytes)
            for future in written:
                future.result()
            written = [thread.submit(writer.add, array) for array in made]
        for future in written:
            future.result()


def _stored_names(name: str, leaves: dict[str, Any]) -> list[str]:
    """The arrays of a parameter: itself, or codes and scales."""
    return [name] if name in leaves else [f"{name}.codes", f"{name}.scale"]


def _one_ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The items, each once the next one is made. jax rounds a part while the part before it is put in its place."""
    held = next(items)
    for item in items:
        yield held
        held = item
    yield held


def _put_rounded(model: Pretrained, part: Part, made: list[np.ndarray], matrix: QuantizedMatrix) -> None:
    scale = np.asarray(matrix.scale)
    model.check_finite(np.isfinite(scale), part, str(part.stored.dtype))  # a value that is not finite makes it so
    for parameter, values in zip(made, (np.asarray(matrix.codes), scale), strict=True):
        part.put(parameter, values)


@partial(jax.jit, static_argnums=1)
def rounded_part(rows: Any, weights: Weights) -> QuantizedMatrix:
    """Rows of a tensor `[outputs, inputs]`, rounded."""
    return rounded(rows.astype(jnp.float32).T, weights)

"""The checks of `moe-jax doctor --gpu --test`. Each runs in a process of its own, which `selftest` starts and judges:

    python -m moe_jax.planning.card_checks NAME PRESET DTYPES RESULT.npz

A check gives arrays, figures and words by name. Those that are compared are computed on the card and on the CPU, from
the same numbers, in each of the DTYPES (such as `float32,bfloat16`). Their names begin with the dtype. In `float64`,
which only the CPU is asked for, they count as exact.
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import RunConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.planning.run_checks import TOKENS, Results, loop, memory, resume
from moe_jax.system.environment import MIB, ask_nvidia_smi, prepare_environment

MODELS = {"nano": {}, "story-cpu": {}, "seed-158m": {"layers": 2}}
"""Whose gradients and losses are compared, with what is changed. `story-cpu` has blocks, `seed-158m` biases."""
POSITIONS, LEAF = 128, 4096
"""The longest sequence; and how many numbers of a gradient are compared, beside its norm."""
STEPS = 20
"""Of `steps`."""


def model_config(name: str, dtype: str) -> RunConfig:
    """A preset without dropout, as it is compared: short sequences, with the sizes of its matrices."""
    config = with_vocabulary(preset(name))
    model = dataclasses.replace(
        config.model, dropout=0.0, seq_len=min(config.model.seq_len, POSITIONS), **MODELS.get(name, {})
    )
    train = dataclasses.replace(config.train, batch_size=2, grad_accum=1)
    execution = dataclasses.replace(config.execution, compute_dtype=dtype)
    return dataclasses.replace(config, model=model, train=train, execution=execution)


def tokens(config: RunConfig, seed: int = 0) -> np.ndarray:
    """One batch of random tokens, int32 [1, B, T+1]. Few are frequent, as in a text, so a model learns from them."""
    shape = (1, config.train.batch_size, config.model.seq_len + 1)
    return (np.random.default_rng(seed).zipf(1.2, shape) % config.model.vocab_size).astype(np.int32)


def facts(name: str, dtypes: list[str]) -> Results:
    """What is tested: the device, its driver, its free memory, and the versions of the packages."""
    import jax

    from moe_jax.model.precision import Card, choose_policy
    from moe_jax.system.machine import processor, versions

    device = jax.devices()[0]
    card = Card.of(device)
    found: Results = {"platform": card.platform, "compute": choose_policy("auto").compute}
    found["device"] = processor() if card.platform == "cpu" else card.name
    found["capability"] = str(card.capability or "")
    found["MiB of JAX"] = (device.memory_stats() or {}).get("bytes_limit", 0) / MIB
    for field in ("driver_version", "memory.free", "memory.total"):
        found[field] = (ask_nvidia_smi(field) or [""])[0]
    found["WSL"] = "microsoft" in os.uname().release.lower()
    return found | versions()


def forms(name: str, dtypes: list[str]) -> Results:
    """Each operation that has a form for cards, forwards and backwards, on random numbers."""
    import jax
    import jax.numpy as jnp

    from moe_jax.model.kernels.cached_attention import cached_attention
    from moe_jax.model.kernels.cross_entropy import blocked_token_losses, mean_cross_entropy
    from moe_jax.model.kernels.embedding_lookup import embedding_lookup
    from moe_jax.model.kernels.grouped_matmul import grouped_matmul
    from moe_jax.model.kernels.matmul import matmul
    from moe_jax.model.kernels.processor import rotated_pairs, rounded_once
    from moe_jax.model.kernels.quantized import quantized_matmul
    from moe_jax.model.quantized import rounded

    rng, found = np.random.default_rng(0), {}
    ids, targets, further = (jnp.asarray(rng.integers(0, n, size)) for n, size in ((97, (3, 50)), (1003, 300), (4, 5)))
    at_place_30 = partial(cached_attention, positions=jnp.array([[30]]))
    drawn = {
        "matrix product": (matmul, (96, 64), (64, 80)),
        "experts": (partial(grouped_matmul, further_expert=further), (9, 8, 64), (4, 64, 96)),
        "experts in turn": (partial(grouped_matmul, further_expert=further), (9, 1, 64), (4, 64, 96)),
        "rotation": (rotated_pairs, (2, 16, 4, 32), (1, 16, 1, 16), (1, 16, 1, 16)),
        "gate": (partial(rounded_once, lambda _, a, b: jax.nn.silu(a) * b, None), (64, 96), (64, 96)),
        "embedding": (partial(embedding_lookup, ids=ids), (97, 64)),
        "loss": (partial(mean_cross_entropy, targets=targets), (300, 64), (64, 1003)),
    }
    written = {
        "losses": (partial(blocked_token_losses, targets=targets), (300, 64), (64, 1003)),
        "cache": (at_place_30, (1, 1, 4, 32), (1, 2, 32, 64), (1, 2, 64, 32)),
    }
    matrix, rows = rng.normal(size=(128, 96)), rng.normal(size=(4, 128))
    operands = {key: [rng.normal(size=size) for size in sizes] for key, (_, *sizes) in (drawn | written).items()}

    def both_ways(function: Callable[..., Any], *given: Any) -> list[Any]:
        y, pull = jax.vjp(function, *given)
        return [y, *pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))]

    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            for key, (function, *_) in (drawn | written).items():
                run = jax.jit(partial(both_ways, function) if key in drawn else lambda *x, f=function: [f(*x)])
                for i, y in enumerate(run(*(jnp.asarray(x, dtype) for x in operands[key]))):
                    found[f"{dtype}/{key}{f', gradient {i}' if i else ''}"] = y
            for weights in ("int8", "int4"):
                codes = rounded(jnp.asarray(matrix, "float32"), weights)
                found[f"{dtype}/{weights}"] = jax.jit(quantized_matmul)(jnp.asarray(rows, dtype), codes)
    return found


def attention(name: str, dtypes: list[str]) -> Results:
    """What is wrong with cuDNN's attention at the shape of the preset. "" if nothing is."""
    from moe_jax.model.kernels.library_attention import failure

    config = with_vocabulary(preset(name))
    model = config.model
    shape = (config.train.batch_size, model.heads, model.key_value_heads, model.seq_len, model.head_width)
    return {dtype: failure(shape, dtype) for dtype in dtypes if dtype != "float32"}


def gradients(name: str, dtypes: list[str]) -> Results:
    """The gradients of the models, in each dtype, from the same parameters and tokens."""
    import jax
    import jax.numpy as jnp

    from moe_jax.model.transformer import Forms, abstract_model
    from moe_jax.training import gradients as of
    from moe_jax.training.programs import Programs

    found = {}
    for model in MODELS:
        config = model_config(model, "float32")
        params = jax.tree.map(np.asarray, Programs.of(config).initial_params())
        for dtype in dtypes:
            with jax.enable_x64(dtype == "float64"):
                graphdef, _ = abstract_model(config.model, Forms(dtype))
                wide = jax.tree.map(partial(jnp.asarray, dtype="float64" if dtype == "float64" else "float32"), params)
                scale = jnp.float32(1024) if dtype == "float16" else None
                run = jax.jit(partial(of.gradients, graphdef, config=config.train))
                grads, _ = run(wide, tokens(config), jax.random.key(0), scale)
                for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
                    some = leaf.reshape(-1)[:: max(1, leaf.size // LEAF)]
                    values = jnp.append(some, jnp.linalg.norm(leaf.reshape(-1)))
                    found[f"{dtype}/{model}.{jax.tree_util.keystr(path, simple=True, separator='.')}"] = values
    return found


def steps(name: str, dtypes: list[str]) -> Results:
    """The losses of STEPS steps, and how many steps were skipped."""
    from moe_jax.training.programs import Programs

    found = {}
    for model in MODELS:
        for dtype in dtypes:
            config = model_config(model, dtype)
            programs, losses = Programs.of(config), []
            state = programs.state(programs.initial_params())
            for step in range(STEPS):
                state, report = programs.step(state, tokens(config, step))
                losses.append(float(report.metrics.loss))
            found[f"{dtype}/{model}"], found[f"skipped in {dtype}/{model}"] = np.array(losses), int(state.skipped)
    return found


def twice(name: str, dtypes: list[str]) -> Results:
    """How many arrays of the state differ in a bit after the same step again, and after it was saved and restored."""
    import jax

    from moe_jax.runs.checkpoint import CheckpointStore
    from moe_jax.training.programs import Programs

    config = model_config(name, dtypes[-1]).override({("execution", "deterministic"): True})
    programs, batch = Programs.of(config), tokens(config)

    def after_two() -> tuple[Any, list[bytes]]:
        state = programs.step(programs.state(programs.initial_params()), batch)[0]
        saved = jax.tree.map(np.asarray, state)
        return saved, bits(programs.step(state, batch)[0])

    def bits(state: Any) -> list[bytes]:
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

    saved, first = after_two()
    _, again = after_two()
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder))
        store.save(saved, 1, val_loss=None, elapsed=0.0, context={})
        restored = store.restore_newest(programs.state_shapes, lambda _: None)
    assert restored is not None
    resumed = bits(programs.step(jax.tree.map(jax.numpy.asarray, restored[1]), batch)[0])
    count = lambda others: sum(a != b for a, b in zip(first, others, strict=True))  # noqa: E731
    return {"again": count(again), "restored": count(resumed), "arrays": len(first)}


def text(name: str, dtypes: list[str]) -> Results:
    """The tokens that the model `stories` writes in float32, always the likeliest."""
    import jax

    from moe_jax.inference.decode import Decoder
    from moe_jax.inference.sampling import Sampling
    from moe_jax.model.transformer import Forms, abstract_model
    from moe_jax.runs.catalog import run_folder
    from moe_jax.runs.load import open_run

    run = open_run(run_folder("stories"))
    graphdef, _ = abstract_model(run.config.model, Forms("float32"))
    decoder = Decoder(graphdef, run.config.model.seq_len, run.tokenizer.vocab_size)
    prompt, settings = run.tokenizer.encode("Once upon a time"), Sampling(temperature=0)
    drawn = decoder.stream(run.params, prompt, settings=settings, key=jax.random.key(0), stop=-1, limit=TOKENS)
    return {"float32/tokens": np.array(list(drawn))}


ALL = (facts, forms, attention, gradients, steps, twice, memory, text, loop, resume)
CHECKS = {check.__name__: check for check in ALL}


def main(name: str, preset_name: str, dtypes: str, result: str) -> int:
    prepare_environment(deterministic=name == "twice")
    found = CHECKS[name](preset_name, dtypes.split(","))
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in found.items()}
    np.savez(result, **{k: v.astype("float64") if v.dtype.kind in "fV" else v for k, v in arrays.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

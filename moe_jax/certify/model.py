"""Every certificate of a model, and the one that step, evaluation, prefill and decoding are compiled once each."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from moe_jax.certify import Certificate
from moe_jax.certify.arithmetic import layer_arithmetic, router_values, step_arithmetic
from moe_jax.certify.causality import layer_causality, model_causality, writing_causality
from moe_jax.config import RunConfig
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params, abstract_model, create, split
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.programs import Programs

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""The event that jax records once for each program that it compiles or takes from its cache on the disk."""


def initial_params(config: RunConfig) -> Params:
    """Initial parameters, to certify a configuration without a trained run.

    No residual branch starts at zero: through a branch of zeros no token could change the output of another token.
    Balance biases are random: biases of zero would change nothing.
    """
    model = dataclasses.replace(config.model, zero_init_residual=False)
    params = split(create(model, jax.random.key(config.train.seed)))[1]
    if model.dense == "none" and model.routing.balancing == "bias":
        for number, block in enumerate(params["blocks"].values()):
            bias = jax.random.normal(jax.random.key(number), (model.experts,))
            # Added to probabilities, whose mean is 1 / E and whose deviation is about 0.1 / E.
            block["ffn"]["balance_bias"] = 0.05 / model.experts * bias
    return params


def certify(config: RunConfig, params: Params, batch_size: int) -> Iterator[Certificate]:
    """Yield the certificates of a model one by one. `config.model.vocab_size` must not be 0."""
    if config.model.dense == "none":
        yield layer_causality(config.model, params["blocks"][0]["ffn"])
    yield from model_causality(config, params)
    yield writing_causality(_decoder(config), params, config.model.vocab_size)
    if config.model.dense == "none":
        yield layer_arithmetic(config.model)
        yield from step_arithmetic(config, batch_size)
        yield router_values(config.model, params, Programs.of(config).policy.compute)
    yield compilations(config, params, batch_size)


def _decoder(config: RunConfig) -> Decoder:
    return Decoder(abstract_model(config.model)[0], config.model.seq_len, config.model.vocab_size)


@contextmanager
def compilations_counted() -> Iterator[Counter[str]]:
    """How often jax compiles each function while the context is open, by the function's name."""
    counts: Counter[str] = Counter()

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event == LOWERED:
            counts[str(about.get("fun_name")).removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def compilations(config: RunConfig, params: Params, batch_size: int) -> Certificate:
    """Run step, evaluation, prefill and decoding on several inputs, and count how often each is compiled."""
    length, vocabulary = config.model.seq_len, config.model.vocab_size
    rng, decoder = np.random.default_rng(0), _decoder(config)
    evaluation = make_evaluation_step(abstract_model(config.model)[0])
    with compilations_counted() as written:
        for n in (1, length):
            stream = rng.integers(0, vocabulary, length + n).astype(np.int32)
            evaluate(evaluation, params, stream, seq_len=length, token_bytes=np.ones(vocabulary, np.int64))
            prompt = [int(t) for t in rng.integers(0, vocabulary, n)]
            list(decoder.stream(params, prompt, settings=Sampling(), key=jax.random.key(n), stop=-1, limit=3))
    programs = Programs.of(config)
    state, tokens = programs.state(programs.initial_params()), rng.integers(0, vocabulary, (1, batch_size, length + 1))
    with compilations_counted() as trained:
        for _ in range(2):
            state, report = programs.step(state, tokens.astype(np.int32))
            jax.block_until_ready(report)
    counts = {
        "step": trained["step"],
        "evaluation": written["step"],
        "prefill": written["prefill"],
        "decoding": written["write"],
    }
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    return Certificate("compilations", set(counts.values()) == {1}, found, "1 each")

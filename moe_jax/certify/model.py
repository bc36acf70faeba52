"""Every certificate of a model, for `python -m moe_jax certify`, and the count of compilations.

causality      no bit of an output changes if a later token changes, while tokens are dropped      `causality.py`
arithmetic     the matrix products of compiled programs are exactly those of the formulas         `arithmetic.py`
compilations   step, evaluation, prefill and decoding are compiled once each                       here
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from moe_jax.certify import Certificate
from moe_jax.certify.arithmetic import layer_arithmetic, step_arithmetic
from moe_jax.certify.causality import layer_causality, model_causality, writing_causality
from moe_jax.config import RunConfig
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params, abstract_model, create, split
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.programs import RandomTokenTrainer


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
    decoder = Decoder(abstract_model(config.model)[0], config.model.seq_len, config.model.vocab_size)
    if config.model.dense == "none":
        yield layer_causality(config.model, params["blocks"][0]["ffn"])
    yield from model_causality(config, params)
    yield writing_causality(decoder, params, config.model.vocab_size)
    if config.model.dense == "none":
        yield from layer_arithmetic(config.model)
        yield from step_arithmetic(config, batch_size)
    yield compilations(config, params, batch_size, decoder)


def compilations(config: RunConfig, params: Params, batch_size: int, decoder: Decoder) -> Certificate:
    """Run step, evaluation, prefill and decoding on several inputs, and count how often each was compiled."""
    length, vocabulary = config.model.seq_len, config.model.vocab_size
    rng = np.random.default_rng(0)
    evaluation = make_evaluation_step(abstract_model(config.model)[0])
    for n in (1, length):
        stream = rng.integers(0, vocabulary, length + n).astype(np.int32)
        evaluate(evaluation, params, stream, seq_len=length, token_bytes=np.ones(vocabulary, np.int64))
        prompt = [int(t) for t in rng.integers(0, vocabulary, n)]
        list(decoder.stream(params, prompt, settings=Sampling(), key=jax.random.key(n), stop=-1, limit=3))
    trainer = RandomTokenTrainer.of(config, batch_size)
    for _ in range(2):
        jax.block_until_ready(trainer())
    programs = {
        "step": trainer.step,
        "evaluation": evaluation,
        "prefill": decoder.prefill,
        "decoding": decoder.write,
    }
    counts = {name: program._cache_size() for name, program in programs.items()}  # pyright: ignore
    return Certificate(
        "compilations",
        set(counts.values()) == {1},
        ", ".join(f"{name} {count}" for name, count in counts.items()),
        "1 each",
    )

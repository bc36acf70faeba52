"""Every certificate of a model, for `python -m moe_jax certify`.

causality      no bit of an output changes if a later token changes, while tokens are dropped      `causality.py`
arithmetic     the matrix products of compiled programs are those of the formulas, and hardly more `arithmetic.py`
memory         no array in a layer is as large as the rows of all tokens for all experts           `arithmetic.py`
compilations   step, evaluation, prefill and decoding are compiled once each                       `compilations.py`
"""

import dataclasses
from collections.abc import Iterator

import jax

from moe_jax.certificates.arithmetic import layer_arithmetic, step_arithmetic
from moe_jax.certificates.causality import layer_causality, model_causality, random_bias
from moe_jax.certificates.certificate import Certificate
from moe_jax.certificates.compilations import compilations
from moe_jax.config import RunConfig
from moe_jax.model.transformer import Params, create, split


def initial_params(config: RunConfig) -> Params:
    """Initial parameters, to certify a configuration without a trained run.

    No residual branch starts at zero: through a branch of zeros no token could change the output of another token.
    Balance biases are random: biases of zero would change nothing.
    """
    model = dataclasses.replace(config.model, zero_init_residual=False)
    params = split(create(model, jax.random.key(config.train.seed)))[1]
    if model.dense == "none" and model.routing.balancing == "bias":
        for number, block in enumerate(params["blocks"].values()):
            block["ffn"]["balance_bias"] = random_bias(model, number)
    return params


def certify(config: RunConfig, params: Params, batch_size: int) -> Iterator[Certificate]:
    """Yield the certificates of a model one by one. `config.model.vocab_size` must not be 0."""
    if config.model.dense == "none":
        yield from layer_causality(config.model, params["blocks"][0]["ffn"])
    yield model_causality(config, params)
    if config.model.dense == "none":
        yield from layer_arithmetic(config.model)
        yield from step_arithmetic(config, batch_size)
    yield compilations(config, params, batch_size)

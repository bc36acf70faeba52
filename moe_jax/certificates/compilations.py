"""Each program is compiled once: step, evaluation, prefill and decoding, for inputs of any length."""

import jax
import numpy as np

from moe_jax.certificates.certificate import Certificate
from moe_jax.config import RunConfig
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params, abstract_model
from moe_jax.training.evaluate import evaluate, make_evaluation_step
from moe_jax.training.random_tokens import RandomTokenTrainer


def compilations(config: RunConfig, params: Params, batch_size: int) -> Certificate:
    """Run step, evaluation, prefill and decoding on several inputs, and count how often each was compiled."""
    graphdef, _ = abstract_model(config.model)
    length, vocabulary = config.model.seq_len, config.model.vocab_size
    rng = np.random.default_rng(0)
    evaluation = make_evaluation_step(graphdef)
    decoder = Decoder(graphdef, length, vocabulary)
    for n in (1, length // 2):
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

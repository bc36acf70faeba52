"""Passes with some experts switched off: the loss of a text, and the text that a model writes.

Every sequence of a batch has switches of its own (`moe_jax.model.moe.switchable`), so one compiled program serves all
experts. Both passes drop nothing, as in evaluation and generation. So a token changes only because of the expert, and
not because another token found a slot free.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import RunConfig
from moe_jax.inference.decode import DecodeState, advance, draw, prefill
from moe_jax.inference.sampling import Sampling
from moe_jax.model.kernels.cross_entropy import blocked_token_losses
from moe_jax.model.moe.layer import Mode
from moe_jax.model.moe.switchable import SwitchableMoE, with_switches
from moe_jax.model.transformer import Params, abstract_model, merge

type SwitchedLosses = Callable[[Params, np.ndarray, np.ndarray], Array]


def switchable_graphdef(config: RunConfig, compute: str) -> nnx.GraphDef:
    """The static definition of a run's model whose experts can be switched off. `compute` is its compute precision."""
    graphdef, _ = abstract_model(
        config.model, compute, config.train.param_dtype, config.execution.remat, moe=SwitchableMoE
    )
    return graphdef


def make_switched_losses(graphdef: nnx.GraphDef) -> SwitchedLosses:
    """The jitted (params, off bool [L, B, E], tokens int [B, T+1]) -> cross-entropy of tokens 1 to T in nats [B, T].

    `graphdef` is that of a model of `SwitchableMoE`, `params` are those of the trained model.
    """

    def losses(params: Params, off: Bool[Array, "L B E"], tokens: Int[Array, "B T1"]) -> Float[Array, "B T"]:
        model = merge(graphdef, with_switches(params, off))
        hidden, _, _ = model(tokens[:, :-1], Mode.GENERATE)
        found = blocked_token_losses(
            hidden.reshape(-1, hidden.shape[-1]), model.head_matrix(), tokens[:, 1:].reshape(-1)
        )
        return found.reshape(len(tokens), -1)

    return jax.jit(losses)


class SwitchedWriter:
    """Continues one prompt under many switches at once.

    All continuations are drawn with the same random numbers, those of `decode.Decoder`. So two of them differ only
    where the switches made a difference.
    """

    def __init__(self, graphdef: nnx.GraphDef, vocab_size: int, limit: int) -> None:
        self._write = jax.jit(partial(_write, graphdef, vocab_size, limit))
        self._limit = limit

    def tokens(
        self, params: Params, off: np.ndarray, prompt: np.ndarray, settings: Sampling, key: Key[Array, ""]
    ) -> np.ndarray:
        """int [B, limit]: the continuations of a prompt int [n], n >= 1, under the switches bool [L, B, E].

        They go on after a separator; the caller cuts them there.
        """
        padded = np.zeros((1, len(prompt) + self._limit), np.int32)
        padded[0, : len(prompt)] = prompt
        return np.asarray(self._write(params, off, padded, np.int32(len(prompt)), settings, key))


def _write(
    graphdef: nnx.GraphDef,
    vocab_size: int,
    limit: int,
    params: Params,
    off: Bool[Array, "L B E"],
    prompt: Int[Array, "1 S"],
    length: Int[Array, ""],
    settings: Sampling,
    key: Key[Array, ""],
) -> Int[Array, "B limit"]:
    params = with_switches(params, off)

    def add(state: DecodeState, n: Int[Array, ""]) -> tuple[DecodeState, Int[Array, " B"]]:
        number = jax.random.fold_in(key, n)
        one = lambda logits, seen: draw(vocab_size, logits[None], settings, seen[None], number)[0]  # noqa: E731
        token = jax.vmap(one)(state.logits, state.seen)
        return advance(graphdef, params, state, token), token

    state = prefill(graphdef, params, jnp.broadcast_to(prompt, (off.shape[1], prompt.shape[1])), length)
    _, tokens = jax.lax.scan(add, state, jnp.arange(limit))
    return tokens.T

"""From a model to a text: ask for the next token, append it, ask again.

Tokens are padded on the right to the model's window, so that one compiled program serves every length. A causal model
does not see the padding. Where the window is full, its later half becomes the new beginning.
"""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

type NextLogits = Callable[[Array, int], Float[Array, " V"]]
"""(tokens [1, window], how many of them count) -> the logits of the token after these."""


def write(
    next_logits: NextLogits,
    prompt: Sequence[int],
    window: int,
    limit: int,
    choose: Callable[[np.ndarray, int], int] | None = None,
    stop: int | None = None,
) -> Iterator[int]:
    """The tokens after the prompt: up to `limit`, or until `stop` is chosen.

    `choose` takes the logits and the number of the step; without it the likeliest token is taken, of equals the lower.
    """
    context = list(prompt)[-window:]
    for n in range(limit):
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(context)] = context
        logits = np.asarray(next_logits(jnp.asarray(padded), len(context)))
        token = int(np.argmax(logits)) if choose is None else choose(logits, n)
        if token == stop:
            return
        yield token
        context.append(token)
        if len(context) > window:
            context = context[-(window // 2) :]

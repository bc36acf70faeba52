"""What each expert is good for: the loss of a text, and the text that the model writes, with that expert switched off.

An expert that is switched off cannot be chosen. The router decides as if the expert did not exist: the next-best expert
takes its place, and the gates are renormalised (`moe_jax.model.moe.layer`). Nothing is trained again. Nothing is
dropped, so no token changes because another one found a slot free.

One expert of one layer is off at a time. All of them are rows of a few batches, so two compiled programs serve all
experts: one for the losses and one for the stories.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import ModelConfig, UserError
from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import PromptState, advance, draw, prefill
from moe_jax.inference.traced_pass import check_routed, tokens_at_once
from moe_jax.inspection.switches import switchable_graphdef, switchable_writer, switches_of, with_switches
from moe_jax.inspection.trace import windows
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.kernels.cross_entropy import blocked_token_losses
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.runs.load import LoadedRun
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.system.terminal import progress_bar

TEXT_TOKENS, LEAST_TOKENS = 512, 64
"""Tokens of the text whose losses are computed, rounded down to whole windows of T tokens, but at least one window. For
a large model fewer, but at least LEAST_TOKENS."""
STORY_ROWS = 64
"""Most stories of one call of the compiled program, which bounds the memory of their keys and values."""
STORY_TOKENS = 96
PROMPT_WORDS, PROMPT_TOKENS = 6, 32
SETTINGS, SEED = Sampling(temperature=0.8), 0
MOST_FLOPS = 6e12
"""Forward operations that a report may spend on this, about half a minute of two CPU cores. A model that needs more for
all its layers gets fewer layers, evenly spaced; then a shorter text; and then no stories."""
MOST_EXPERTS = 256
"""Most experts that are switched off, in all layers together, but always those of one layer."""


@dataclass(frozen=True)
class Ablation:
    """Losses and stories before and after, for A layers of a model, and each of their E experts."""

    layers: list[int]
    """The A layers whose experts were switched off, one expert at a time."""
    loss: np.ndarray
    """float32 [n-1]: cross-entropy of tokens 1 to n-1 in nats, with all experts."""
    without: np.ndarray
    """float32 [A, E, n-1]: the same without the expert."""
    prompt: str
    story: str
    """What the model writes after the prompt."""
    stories: list[list[str]]
    """[A][E]: the same without the expert, drawn with the same random numbers. Empty: the model is too large."""

    @property
    def change(self) -> np.ndarray:
        """float32 [A, E, n-1]: loss without the expert - loss with it, in nats. Above 0 the expert helped."""
        return self.without - self.loss


def ablation(run: LoadedRun, tokens: np.ndarray) -> Ablation:
    """Switch off the experts one at a time, on a text of token ids int [N].

    Raises UserError where there is no other expert, or no token to predict.
    """
    config = run.config.model
    check_routed(config)
    if config.experts < 2:
        raise UserError("The layers of this model have one expert each, so none can take its place.")
    tokens = tokens[: max(TEXT_TOKENS // config.seq_len, 1) * config.seq_len]
    if len(tokens) < 2:
        raise UserError("The text has no token that could be predicted.")
    layers, most, tells = affordable(config, len(tokens))
    tokens = tokens[:most]
    off = one_off_at_a_time(config.layers, config.experts, layers) | switches_of(run)[:, None]
    losses = switched_losses(run, tokens, off)
    if not np.isfinite(losses).all():
        raise UserError("The model gives NaN or infinity without one of its experts.")
    prompt = prompt_of(run.tokenizer, tokens, config.seq_len)
    stories = switched_stories(run, prompt, off) if tells else []
    count = config.experts
    return Ablation(
        layers=layers,
        loss=losses[0],
        without=losses[1:].reshape(len(layers), count, -1),
        prompt=prompt,
        story=stories[0] if tells else "",
        stories=[stories[1 + a * count :][:count] for a in range(len(layers))] if tells else [],
    )


def affordable(config: ModelConfig, tokens: int) -> tuple[list[int], int, bool]:
    """What MOST_FLOPS pays for: (layers, tokens, whether there are stories). One layer is always among them."""
    paid = int(MOST_FLOPS / (2 * totals(count_parameters(config)).multiplied * config.experts))  # tokens of one layer
    told = tokens + PROMPT_TOKENS + STORY_TOKENS
    tells = paid >= told
    tokens = tokens if tells else min(tokens, max(paid, LEAST_TOKENS))
    most = min(max(MOST_EXPERTS // config.experts, 1), config.layers)
    count = int(np.clip(paid // (told if tells else tokens), 1, most))
    return sorted({round(layer) for layer in np.linspace(0, config.layers - 1, count)}), tokens, tells


def one_off_at_a_time(count: int, experts: int, layers: list[int]) -> np.ndarray:
    """bool [L, 1 + A*E, E]: switches of L layers. In row 0 all are on. In row 1 + a*E + e expert e of layers[a] is
    off."""
    off = np.zeros((count, 1 + len(layers) * experts, experts), bool)
    for a, layer in enumerate(layers):
        rows = slice(1 + a * experts, 1 + (a + 1) * experts)
        off[layer, rows] = np.eye(experts, dtype=bool)
    return off


def make_switched_losses(graphdef: nnx.GraphDef) -> Callable[[Params, np.ndarray, np.ndarray], Array]:
    """The jitted (params, off bool [L, B, E], tokens int [B, T+1]) -> cross-entropy of tokens 1 to T in nats [B, T].

    `graphdef` has layers of `SwitchableMoE`, `params` are the parameters of the trained model.
    """

    def losses(params: Params, off: Bool[Array, "L B E"], tokens: Int[Array, "B T1"]) -> Float[Array, "B T"]:
        model = merge(graphdef, with_switches(params, off))
        hidden, _, _ = model(tokens[:, :-1], Mode.GENERATE)
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
        return blocked_token_losses(rows, model.head_matrix(), targets).reshape(len(tokens), -1)

    return jax.jit(losses)


def make_switched_writer(graphdef: nnx.GraphDef, vocab_size: int, limit: int) -> Callable[..., Array]:
    """The jitted (params, off bool [L, B, E], prompt int [1, n + limit], n, settings, key) -> int [B, limit], the
    continuations of a padded prompt of n >= 1 tokens under the switches. They go on after a separator.

    All are drawn with the same random numbers, as `Decoder` draws them. So two of them differ only where the switches
    made a difference.
    """

    def write(
        params: Params,
        off: Bool[Array, "L B E"],
        prompt: Int[Array, "1 S"],
        length: Int[Array, ""],
        settings: Sampling,
        key: Key[Array, ""],
    ) -> Int[Array, "B limit"]:
        params = with_switches(params, off)

        def add(carry: tuple[PromptState, Array], n: Int[Array, ""]) -> tuple[tuple[PromptState, Array], Array]:
            state, seen = carry
            number = jax.random.fold_in(key, n)
            one = lambda logits, seen: draw(vocab_size, logits[None], settings, seen[None], number)[0]  # noqa: E731
            token = jax.vmap(one)(state.logits, seen)
            seen = seen | jax.nn.one_hot(token, seen.shape[-1], dtype=bool)
            return (advance(graphdef, params, state, token), seen), token

        state = prefill(graphdef, params, jnp.broadcast_to(prompt, (off.shape[1], prompt.shape[1])), length)
        _, tokens = jax.lax.scan(add, (state, jnp.zeros(state.logits.shape, bool)), jnp.arange(limit))
        return tokens.T

    return jax.jit(write)


def switched_losses(run: LoadedRun, tokens: np.ndarray, off: np.ndarray) -> np.ndarray:
    """float32 [R, N-1]: cross-entropy of tokens 1 to N-1 of a text int [N], under each row of switches bool [L, R, E].

    The text is divided into windows of T tokens, as in a trace.
    """
    step = make_switched_losses(switchable_graphdef(run.config, run.policy.compute))
    width = min(run.config.model.seq_len, len(tokens))
    size = min(max(tokens_at_once(run.config.model) // width, 1), off.shape[1])
    parts, groups = [], -(-off.shape[1] // size)
    with progress_bar("switching experts off", groups * -(-len(tokens) // width)) as advance:
        for window, n in windows(tokens, width):
            batch, rows = np.broadcast_to(window, (size, width + 1)), []
            for group, count in _groups(off, size):
                rows.append(np.asarray(step(run.params, group, batch))[:count, :n])
                advance(1)
            parts.append(np.concatenate(rows))
    return np.concatenate(parts, axis=1)[:, :-1]


def switched_stories(run: LoadedRun, prompt: str, off: np.ndarray) -> list[str]:
    """What the model writes after a prompt, under each row of switches bool [L, R, E]. With all experts on, it is what
    `generate` writes with SETTINGS and SEED, at most STORY_TOKENS tokens of it and no more than the context holds."""
    tokenizer = run.tokenizer
    start = [tokenizer.separator_id, *tokenizer.encode(prompt)]
    limit = min(STORY_TOKENS, run.config.model.seq_len - len(start))
    padded = np.zeros((1, len(start) + limit), np.int32)
    padded[0, : len(start)] = start
    write = make_switched_writer(switchable_writer(run), tokenizer.vocab_size, limit)
    key = purpose_key(SEED, Purpose.SAMPLE, 0)
    stories: list[str] = []
    for group, count in _groups(off, min(STORY_ROWS, off.shape[1])):
        rows = np.asarray(write(run.params, group, padded, np.int32(len(start)), SETTINGS, key))[:count]
        stories += [_decoded(tokenizer, row.tolist()) for row in rows]
    return stories


def _groups(off: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Groups of `size` rows of switches, the last one filled up; and how many of its rows count."""
    for first in range(0, off.shape[1], size):
        group = off[:, first : first + size]
        filled = np.pad(group, ((0, 0), (0, size - group.shape[1]), (0, 0)))
        yield filled, group.shape[1]


def _decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of the tokens before the first separator."""
    end = tokens.index(tokenizer.separator_id) if tokenizer.separator_id in tokens else len(tokens)
    text = StreamDecoder(tokenizer)
    return "".join([*map(text.feed, tokens[:end]), text.finish()])


def prompt_of(tokenizer: Tokenizer, tokens: np.ndarray, seq_len: int) -> str:
    """The first words of a text: at most PROMPT_WORDS, and no more tokens than PROMPT_TOKENS and half a context."""
    most = min(PROMPT_TOKENS, seq_len // 2) - 1
    ids = tokens.tolist()
    ids = ids[1:] if ids[0] == tokenizer.separator_id else ids
    ids = ids[: ids.index(tokenizer.separator_id)] if tokenizer.separator_id in ids else ids
    begin = tokenizer.decode_bytes(ids[: 4 * PROMPT_TOKENS]).decode(errors="ignore")
    words = begin.split(" ")[:PROMPT_WORDS]
    while words and len(tokenizer.encode(" ".join(words).rstrip())) > most:
        words.pop()
    return " ".join(words).rstrip()


def ablation_data(result: Ablation) -> dict[str, Any]:
    """What the report shows, ready for JSON. Losses and changes are whole numbers, in hundredths of a nat."""
    hundredths = lambda nats: np.rint(100 * nats.astype(float)).astype(int).tolist()  # noqa: E731
    return {
        "layers": result.layers,
        "loss": hundredths(result.loss),
        "change": hundredths(result.change),
        "mean": np.round(result.change.astype(float).mean(-1), 4).tolist(),
        "prompt": result.prompt,
        "story": result.story,
        "stories": result.stories,
        "temperature": SETTINGS.temperature,
        "seed": SEED,
    }

"""Checks of the parts that any transformer has: activations, linear maps, losses, norms, positions, attention."""

from collections.abc import Iterator

import numpy as np

from foundation import (
    activations,
    attention,
    caching,
    dropout,
    embedding,
    grouped_heads,
    linear,
    losses,
    norms,
    positions,
    softmax,
)
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import AnyCheck, Check, OracleCheck


def activation_checks() -> Iterator[Check]:
    """Each nonlinearity at ordinary and at saturated inputs."""
    for name, (forward, backward) in activations.ACTIVATIONS.items():
        for case, shape, std in (("matrix", (5, 7), 1.0), ("saturated", (4, 6), 12.0)):
            x = Draws(f"{name}/{case}").normal(*shape, std=std)
            x = x + np.sign(x) * 0.05  # off ReLU's kink
            yield Check(name, case, forward, backward, (x,), margin=np.min(np.abs(x)))
    zero = np.zeros((3,))
    yield Check("relu", "kink", activations.relu_forward, activations.relu_backward, (zero,), at_tie=True)


def linear_checks() -> Iterator[Check]:
    """The affine map with and without bias, at odd shapes; dropout with a given mask."""
    for case, shape, outputs, bias in (
        ("matrix", (4, 3), 5, True),
        ("no bias", (4, 3), 5, False),
        ("square", (3, 3), 3, True),  # where a forgotten transpose still has the right shape
        ("leading axes", (2, 3, 4), 5, True),
        ("one row", (1, 3), 2, True),
        ("vector", (3,), 2, True),
    ):
        draws = Draws(f"linear/{case}")
        inputs = (
            draws.normal(*shape),
            draws.normal(shape[-1], outputs),
            draws.normal(outputs) if bias else None,
        )
        yield Check("linear", case, linear.linear_forward, linear.linear_backward, inputs)
    draws = Draws("dropout")
    for case, keep in (
        ("mask", draws.keep(4, 5)),
        ("all dropped", np.zeros((4, 5), bool)),
        ("no mask", None),
    ):
        yield Check(
            "dropout",
            case,
            filled_with(dropout.dropout_forward, keep, 0.25),
            dropout.dropout_backward,
            (draws.normal(4, 5),),
        )


def softmax_and_loss_checks() -> Iterator[Check]:
    """Softmax with masks, logsumexp, squared error, cross-entropy with ignored positions."""
    draws = Draws("softmax and losses")
    rows, mask = draws.normal(4, 6), draws.keep(4, 6)
    mask[0], mask[1] = False, True
    for case, logits, seen in (
        ("rows", rows, None),
        ("masked, one row whole", rows, mask),
        ("saturated", 40.0 * rows, None),
        ("one entry", draws.normal(3, 1), None),
        ("equal logits", np.ones((2, 5)), None),
    ):
        yield Check("softmax", case, filled_with(softmax.softmax_forward, seen), softmax.softmax_backward, (logits,))
    for case, logits in (("rows", rows), ("saturated", 300.0 * rows)):
        yield Check("logsumexp", case, softmax.logsumexp_forward, softmax.logsumexp_backward, (logits,))
    for case, shape in (("matrix", (4, 3)), ("one entry", (1,))):
        pair = (draws.normal(*shape), draws.normal(*shape))
        yield Check("mse", case, losses.mse_forward, losses.mse_backward, pair)
    targets = draws.integers(6, 2, 4)
    some = targets.copy()
    some[0, 1:3] = losses.IGNORE
    for case, scale, wanted in (
        ("batch", 1.0, targets),
        ("ignored positions", 1.0, some),
        ("all ignored", 1.0, np.full((2, 4), losses.IGNORE)),
        ("confident and wrong", 50.0, targets),
    ):
        forward = filled_with(losses.cross_entropy_forward, wanted)
        logits = draws.normal(2, 4, 6, std=scale)
        yield Check("cross_entropy", case, forward, losses.cross_entropy_backward, (logits,))


def norm_checks() -> Iterator[Check]:
    """LayerNorm with and without bias, RMSNorm; rows whose variance is as small as eps."""
    for case, shape, std in (
        ("rows", (2, 3, 5), 1.0),
        ("one row", (4,), 1.0),
        ("variance near eps", (3, 5), 3e-3),
    ):
        draws = Draws(f"norms/{case}")
        x, scale, bias = draws.normal(*shape, std=std), draws.normal(shape[-1]), draws.normal(shape[-1])
        yield Check("layernorm", case, norms.layernorm_forward, norms.layernorm_backward, (x, scale, bias))
        yield Check("rmsnorm", case, norms.rmsnorm_forward, norms.rmsnorm_backward, (x, scale))
    draws = Draws("norms/no bias")
    inputs = (draws.normal(3, 5) + 4.0, draws.normal(5), None)
    yield Check("layernorm", "no bias, mean of 4", norms.layernorm_forward, norms.layernorm_backward, inputs)


def embedding_and_position_checks() -> Iterator[AnyCheck]:
    """Lookup with repeated and with unused rows, the tied head, learned positions, RoPE."""
    draws = Draws("embedding and positions")
    table = draws.normal(7, 4)
    for case, tokens in (
        ("repeated and unused rows", np.array([[1, 1, 4], [1, 0, 6]])),
        ("one token", np.array([[2]])),
    ):
        forward = filled_with(embedding.embedding_forward, tokens)
        yield Check("embedding", case, forward, embedding.embedding_backward, (table,))
    head = (draws.normal(2, 3, 4), table)
    yield Check("tied_head", "batch", embedding.tied_head_forward, embedding.tied_head_backward, head)
    for case, length in (("shorter than the table", 3), ("as long as the table", 5)):
        forward, backward = positions.learned_positions_forward, positions.learned_positions_backward
        yield Check("learned_positions", case, forward, backward, (draws.normal(2, length, 4), draws.normal(5, 4)))
    for case, shape in (("heads", (2, 2, 5, 4)), ("one position", (1, 6)), ("one pair", (7, 2))):
        yield Check("rope", case, positions.rope_forward, positions.rope_backward, (draws.normal(*shape),))
    forward = filled_with(positions.rope_forward, 50.0, positions.slowed_pairs(8, 4.0, 16, 50.0))
    yield Check("rope", "slow pairs slowed", forward, positions.rope_backward, (draws.normal(5, 8),))
    for case, constants in (("base 10,000", (16, 8.0, 512)), ("base 50", (8, 4.0, 16, 50.0))):
        yield OracleCheck("slowed_pairs", case, positions.slowed_pairs, pair_by_pair, (), constants)


def pair_by_pair(width: int, factor: float, trained: int, base: float = positions.ROPE_BASE) -> np.ndarray:
    """Each pair by itself: the positions of one whole turn, its wave length, against the trained length."""
    slowed = []
    for pair in range(width // 2):
        wave = 2.0 * np.pi * base ** (2 * pair / width)
        if wave < trained / 4.0:
            slowed.append(1.0)
        elif wave > trained:
            slowed.append(1.0 / factor)
        else:
            smooth = (trained / wave - 1.0) / 3.0
            slowed.append(smooth + (1.0 - smooth) / factor)
    return np.array(slowed)


def grouped_head_checks() -> Iterator[Check]:
    """Key heads that a group reads; rows of one head, and one row of all heads."""
    draws = Draws("grouped heads")
    for case, shared, heads in (("groups of two", 2, 4), ("one for all", 1, 3), ("one each", 2, 2)):
        forward = filled_with(grouped_heads.share_heads_forward, heads)
        yield Check("share_heads", case, forward, grouped_heads.share_heads_backward, (draws.normal(2, shared, 3, 4),))
    for case, length, std in (("each head", 4, 1.0), ("all heads together", 8, 1.0), ("squares near eps", 8, 3e-3)):
        inputs = (draws.normal(2, 3, 8, std=std), draws.normal(length))
        forward, backward = grouped_heads.normalise_heads_forward, grouped_heads.normalise_heads_backward
        yield Check("normalise_heads", case, forward, backward, inputs)


def attention_checks() -> Iterator[Check]:
    """One head: under masks, with fewer queries than keys, and with dropout."""
    draws = Draws("attention")
    padding = np.ones((2, 4, 4), bool)
    padding[0, 2] = padding[1, :, 0] = False
    for case, shape, mask, scale in (
        ("no mask", (2, 4, 3), None, 1.0),
        ("causal", (2, 4, 3), attention.causal_mask(4), 1.0),
        ("a row sees nothing", (2, 4, 3), padding, 1.0),
        ("a window of 2 and a sink", (2, 5, 3), caching.window_mask(5, 2, 1), 1.0),
        ("one position", (1, 3), attention.causal_mask(1), 1.0),
        ("saturated", (2, 4, 3), attention.causal_mask(4), 6.0),
    ):
        q, k, v = (draws.normal(*shape, std=scale) for _ in range(3))
        yield Check(
            "attention",
            case,
            filled_with(attention.attention_forward, mask),
            attention.attention_backward,
            (q, k, v),
        )
    cross = (draws.normal(2, 3, 4), draws.normal(2, 5, 4), draws.normal(2, 5, 4))
    yield Check(
        "attention",
        "fewer queries than keys",
        attention.attention_forward,
        attention.attention_backward,
        cross,
    )
    keep = draws.keep(2, 4, 4)
    qkv = tuple(draws.normal(2, 4, 3) for _ in range(3))
    forward = filled_with(attention.attention_forward, attention.causal_mask(4), keep, 0.25)
    yield Check("attention", "dropout of the weights", forward, attention.attention_backward, qkv)


def multi_head_checks() -> Iterator[Check]:
    """Multi-head attention with every option."""
    draws = Draws("multi-head attention")
    for case, heads, bias, rotary, length in (
        ("plain", 2, False, False, 4),
        ("biases", 2, True, False, 4),
        ("rotary", 2, True, True, 4),
        ("one head", 1, False, True, 3),
        ("one position", 2, True, True, 1),
    ):
        params = attention_params(draws, 8, bias)
        forward = filled_with(attention.multi_head_forward, heads, rotary)
        inputs = (draws.normal(2, length, 8), params)
        yield Check("multi_head", case, forward, attention.multi_head_backward, inputs)
    forward = filled_with(attention.multi_head_forward, 2, False, draws.keep(2, 2, 3, 3), 0.25)
    inputs = (draws.normal(2, 3, 8), attention_params(draws, 8, bias=True))
    yield Check("multi_head", "dropout of the weights", forward, attention.multi_head_backward, inputs)

    for case, heads, shared, head_width, lengths, base in (
        ("grouped keys", 4, 2, 2, None, 10_000.0),
        ("one key head, normalised, base 7", 2, 1, 6, (6, 6), 7.0),
        ("grouped keys normalised together", 4, 2, 4, (16, 8), 10_000.0),
    ):
        params = grouped_params(draws, 8, heads * head_width, shared * head_width, lengths)
        forward = filled_with(attention.multi_head_forward, heads, True, None, 0.0, base)
        yield Check("multi_head", case, forward, attention.multi_head_backward, (draws.normal(2, 4, 8), params))


def grouped_params(draws: Draws, width: int, queries: int, keys: int, lengths: tuple[int, int] | None) -> dict:
    """One attention layer with `keys` columns of keys, and with scales of these lengths if there are any."""
    params: dict = {
        "qkv": {"kernel": draws.normal(width, queries + 2 * keys, std=0.5)},
        "out": {"kernel": draws.normal(queries, width, std=0.5)},
    }
    if lengths is not None:
        for name, length in zip(("query_norm", "key_norm"), lengths, strict=True):
            params[name] = {"scale": 1.0 + draws.normal(length, std=0.3)}
    return params


def attention_params(draws: Draws, width: int, bias: bool) -> dict:
    """Projections of one attention layer, of standard deviation 1/2."""
    qkv: dict = {"kernel": draws.normal(width, 3 * width, std=0.5)}
    out: dict = {"kernel": draws.normal(width, width, std=0.5)}
    if bias:
        qkv["bias"], out["bias"] = draws.normal(3 * width), draws.normal(width)
    return {"qkv": qkv, "out": out}

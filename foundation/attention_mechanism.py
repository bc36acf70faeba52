"""`python -m foundation.attention_mechanism [--picture FILE]`: from one score to causal multi-head attention.

A sentence of six words is given vectors by hand, so that every number can be followed: one score, one row of
weights, the mask, several heads. At the end the layer is put beside Flax's own with the same weights.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from foundation.attention import attention_forward, causal_mask, multi_head_forward
from foundation.softmax import softmax_forward

WORDS = ("the", "cat", "saw", "the", "dog", "run")
# Three features by hand: article, animal, verb. Of NumPy, so that float64 does not depend on when jax is told of it.
FEATURES = np.array(
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.2], [0.0, 0.0, 1.0]]
)
# What each feature asks for: an article asks for animals, an animal for verbs, a verb for animals.
ASKS = np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [0.0, 3.0, 0.0]])

HEADS, WIDTH = 2, 6
TOLERANCE = 1e-12


def one_head(causal: bool) -> tuple[Float[Array, "T T"], Float[Array, "T A"]]:
    """(weights, output) of one head on the sentence: q = FEATURES ASKS, k = v = FEATURES."""
    mask = causal_mask(len(WORDS)) if causal else None
    q, kv = jnp.asarray(FEATURES @ ASKS), jnp.asarray(FEATURES)
    output, cache = attention_forward(q, kv, kv, mask)
    return cache.kept, output


def random_layer(key: Array) -> tuple[Float[Array, "1 T D"], dict]:
    """An input and parameters of a multi-head layer for the comparison."""
    keys = jax.random.split(key, 5)
    params = {
        "qkv": {
            "kernel": 0.5 * jax.random.normal(keys[0], (WIDTH, 3 * WIDTH)),
            "bias": jax.random.normal(keys[1], (3 * WIDTH,)),
        },
        "out": {
            "kernel": jax.random.normal(keys[2], (WIDTH, WIDTH)),
            "bias": jax.random.normal(keys[3], (WIDTH,)),
        },
    }
    return jax.random.normal(keys[4], (1, len(WORDS), WIDTH)), params


def flax_layer(params: dict) -> nnx.MultiHeadAttention:
    """Flax's layer with our parameters: three projections instead of a fused one, and heads as an axis."""
    dtype = params["out"]["kernel"].dtype
    layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    kernels, biases = (jnp.split(params["qkv"][name], 3, axis=-1) for name in ("kernel", "bias"))
    weights = {
        name: {"kernel": kernel.reshape(WIDTH, HEADS, -1), "bias": bias.reshape(HEADS, -1)}
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    weights["out"] = {"kernel": params["out"]["kernel"].reshape(HEADS, -1, WIDTH), "bias": params["out"]["bias"]}
    nnx.update(layer, nnx.State(weights))
    return layer


def difference_from_flax(key: Array) -> float:
    """Largest difference between our causal multi-head attention and Flax's, same weights, same input."""
    x, params = random_layer(key)
    ours, _ = multi_head_forward(x, params, HEADS)
    mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
    # Sowing the weights takes Flax's plain path; its default one computes the softmax in float32 in any case.
    theirs = flax_layer(params)(x, mask=mask, sow_weights=True)
    return float(jnp.max(jnp.abs(ours - theirs)))


def head_weights(key: Array) -> Float[Array, "H T T"]:
    """The weights of each head of the random layer."""
    x, params = random_layer(key)
    _, cache = multi_head_forward(x, params, HEADS)
    return cache.attention.kept[0]


def print_weights(weights: Float[Array, "T T"]) -> None:
    """Rows are the words that look, columns the words looked at; shades of a block show the weight."""
    shades = " ░▒▓█"
    print("          " + "".join(f"{word:>6}" for word in WORDS))
    for word, row in zip(WORDS, weights.tolist(), strict=True):
        cells = (f"{shades[min(4, round(4 * w))]}{w:5.2f}" for w in row)
        print(f"  {word:>6}  " + "".join(cells))


def draw(path: Path) -> None:
    """Heat maps: without mask, causal, and the two heads of a random layer."""
    import matplotlib.pyplot as plt

    heads = head_weights(jax.random.key(0))
    panels = {
        "one head, no mask": one_head(causal=False)[0],
        "the same head, causal": one_head(causal=True)[0],
        **{f"random layer, head {h}": heads[h] for h in range(HEADS)},
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), layout="constrained", sharey=True)
    for ax, (title, weights) in zip(axes, panels.items(), strict=True):
        ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(WORDS)), WORDS, rotation=45)
        ax.set_yticks(range(len(WORDS)), WORDS)
        ax.set_title(title, fontsize=11)
        for t, row in enumerate(weights.tolist()):
            for s, weight in enumerate(row):
                if weight > 0.005:
                    colour = "white" if weight > 0.6 else "#223"
                    ax.text(s, t, f"{weight:.2f}".lstrip("0"), ha="center", va="center", fontsize=8, color=colour)
    axes[0].set_ylabel("word that looks")
    figure.supxlabel("word looked at", fontsize=10)
    figure.colorbar(axes[0].images[0], ax=axes, label="weight", shrink=0.85)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Prints the lesson; exit status 1 where our layer is not Flax's."""
    parser = argparse.ArgumentParser(prog="python -m foundation.attention_mechanism", description=__doc__)
    parser.add_argument("--picture", type=Path, help="write heat maps to this file")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    q = FEATURES @ ASKS
    print("1. One score. 'saw' (word 2) asks for animals; 'cat' (word 1) is one.")
    print(f"   q(saw) = {q[2].tolist()}, k(cat) = {FEATURES[1].tolist()}")
    print(f"   score = <q, k> / sqrt(3) = {q[2] @ FEATURES[1]:.0f} / 1.73 = {q[2] @ FEATURES[1] / 3**0.5:.3f}\n")
    row, _ = softmax_forward(jnp.asarray(q[2] @ FEATURES.T / 3**0.5))
    print("2. One row: the softmax of all scores of 'saw'.")
    print("   " + ", ".join(f"{word} {weight:.2f}" for word, weight in zip(WORDS, row.tolist(), strict=True)) + "\n")
    print("3. All rows at once.")
    print_weights(one_head(causal=False)[0])
    print("\n4. Causal: a word sees itself and what came before; each row still sums to 1.")
    weights, output = one_head(causal=True)
    print_weights(weights)
    print(f"   'saw' now carries {output[2].round(2).tolist()} of (article, animal, verb).\n")
    print(f"5. {HEADS} heads of a random layer: each has weights of its own.")
    for head, weights in enumerate(head_weights(jax.random.key(0))):
        print(f"   head {head}")
        print_weights(weights)
    difference = difference_from_flax(jax.random.key(0))
    print(f"\n6. Beside flax.nnx.MultiHeadAttention with the same weights: largest difference {difference:.1e}")
    if arguments.picture:
        draw(arguments.picture)
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

"""Tiny Shakespeare, scored as nanoGPT scores it.

    uv run train.py --data shakespeare --minutes 3 --model.dropout 0.1 --out runs/shakespeare
    uv run python benchmarks/shakespeare.py --run runs/shakespeare

The last tenth of the text is cut into blocks of 256 characters. Each is predicted from nothing but itself. The score is
the mean over its characters, in nats; nanoGPT's README has 1.4697 after 3 minutes of an A100, and 1.88 after 3 minutes
of a laptop's CPU. Our tokens are byte pairs of the training text, and the nats of a block are those of all its tokens.
nanoGPT's first prediction follows one known character; ours follows none, so it has one more to predict.
"""

import argparse

import numpy as np

import moe_jax
from moe_jax.config import DataConfig
from moe_jax.data.corpora import open_corpus

BLOCK = 256
"""Characters of a block."""


def nats_a_character(run: moe_jax.Run, text: str, blocks: int) -> float:
    """The mean loss of a character, over `blocks` blocks that are spread evenly over the text."""
    starts = np.linspace(0, len(text) - BLOCK, blocks).astype(int)
    nats = 0.0
    for start in starts:
        block = text[start : start + BLOCK]
        logits = run.logits(block).astype(np.float64)
        ids = run.tokenizer.encode(block)
        ahead = logits[: len(ids)]
        nats += float(np.sum(np.logaddexp.reduce(ahead, axis=1) - ahead[np.arange(len(ids)), ids]))
    return nats / (BLOCK * blocks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/shakespeare")
    parser.add_argument("--blocks", type=int, default=435)
    given = parser.parse_args()
    text = "\n\n".join(open_corpus(DataConfig(source="shakespeare")).documents("valid"))
    print(f"{nats_a_character(moe_jax.load_run(given.run), text, given.blocks):.4f} nats a character")

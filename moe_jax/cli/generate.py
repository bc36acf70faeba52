"""`moe-jax generate`."""

from typing import Annotated

import tyro

from moe_jax.cli.options import check_range
from moe_jax.cli.sampling import SamplingArguments, loading
from moe_jax.system.terminal import stream_text


def generate(
    sampling: Annotated[SamplingArguments, tyro.conf.arg(name="")] = SamplingArguments(),
    prompt: str = "",
    num_stories: int = 1,
) -> int:
    """Continue a text with a trained model.

    Args:
        prompt: How each text begins.
        num_stories: Texts to write. Each has random draws of its own.
    """
    folder = sampling.checked_run()
    check_range("--num-stories", num_stories, 1, 10_000)
    with loading(folder):
        run, generator, settings = sampling.open(folder)
        tokens = run.tokenizer.encode(prompt)  # raises if it cannot be encoded, before anything is printed
        generator.compile(1 + len(tokens))
    for number in range(num_stories):
        if num_stories > 1:
            print(f"--- {number + 1}")
        pieces = generator.pieces(prompt, settings, seed=sampling.seed, number=number, limit=sampling.max_tokens)
        stream_text(prompt, pieces)
    return 0

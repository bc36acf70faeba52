"""The page of the planted bugs: each as a change of one line, the check that catches it, and where it has happened."""

import difflib

from foundation.challenges.bugs import BUGS
from foundation.challenges.planting import Bug

SIGHTINGS: dict[str, tuple[str, str]] = {
    "micro-batches: a mean of means": (
        "meta-pytorch/torchtune#1875",
        "Each micro-batch was divided by its own count of targets, and the results were averaged.",
    ),
    "decoding: rotary position one off": (
        "lucidrains/rotary-embedding-torch#11",
        "A cache of positions left the offset out of its key: every later call got the positions of the first.",
    ),
    "draft: judged as if every token were its surest": (
        "jaymody/speculative-sampling#3",
        "The draft's token was its likeliest one, and was judged as if it had been drawn.",
    ),
    "balance: f is not divided by K": (
        "huggingface/transformers#43775",
        "The shares of K choices were not divided by K, so they added up to K.",
    ),
    "balance: a loss that ignores the routing": (
        "mindspore-ai/hyper-parallel#752",
        "Two arrays of different shapes were multiplied, and the loss was almost a constant.",
    ),
    "layernorm: mean term missing": (
        "tenstorrent/tt-metal#53204",
        "The same term, subtracted twice. The loss still fell.",
    ),
    "attention: no causal mask": (
        "keras-team/keras#23038",
        "Where the fast path was off, as with dropout, the mask was left out: later tokens could be seen.",
    ),
    "grouped heads: neighbours read different key heads": (
        "onnx/onnx#7274",
        "Key heads were tiled (0, 1, 0, 1) where they must be repeated (0, 0, 1, 1).",
    ),
    "router: plain gates get no gradient": (
        "davidmrau/mixture-of-experts#27",
        "With one choice a token, a softmax over that one choice is 1 whatever the router says: its gradient is 0.",
    ),
    "router: gate gradient dropped": (
        "labmlai/annotated_deep_learning_paper_implementations#95",
        "The gate multiplied the input of the expert instead of its output.",
    ),
    "router: gates not renormalised": (
        "pytorch/torchtitan#1448",
        "A model whose gates add up to 1 was run with gates that do not.",
    ),
    "model: auxiliary losses not averaged over layers": (
        "huggingface/transformers#28255",
        "The routers of all layers were pooled before the product. Two opposite imbalances could cancel.",
    ),
    "model: tied table without the head's share": (
        "paiml/entrenar#314",
        "The table and the head were two copies, each stepped with its own half of the gradient.",
    ),
    "adamw: decay rescaled by the gradient": (
        "keras-team/keras#19051",
        "AdamW inherited Adam's path for decay, and so became Adam with a penalty in the loss.",
    ),
    "all_reduce: R times too large": (
        "jax-ml/jax#3970",
        "The loss was summed over devices before it was differentiated: every gradient came out times their number.",
    ),
    "kl: k1 as a loss": (
        "NVIDIA-NeMo/RL#2506",
        "The sampled divergence was differentiated without the score of the samples: nothing is left, on average.",
    ),
    "kl: k3 where the forward KL is meant": (
        "verl-project/verl#2953",
        "An estimator with the right mean was used as a loss, where its gradient is that of another divergence.",
    ),
}
"""Name of a planted bug -> a public issue in which it, or its nearest kin, was found, and what happened there."""

INTRODUCTION = """# The bug museum

A gradient that is wrong seldom stops a program. The loss still falls, a little slower.

These {count} bugs are planted in `foundation/`, one at a time, by a test. Each must be caught by name: by a row of the
table (`uv run python -m foundation NAME`), or by a test of the forward pass. {seen} have a note that says where the
same mistake, or a close relative, was found in public. The authors of that code know the subject well.

`uv run python -m foundation hunt` plants one for you to find.
"""


def page() -> str:
    """The page, as MyST Markdown."""
    rooms: dict[str, list[Bug]] = {}
    for bug in BUGS:
        rooms.setdefault(bug.place.partition(".")[0], []).append(bug)
    parts = [INTRODUCTION.format(count=len(BUGS), seen=len(SIGHTINGS))]
    for room, bugs in rooms.items():
        parts.append(f"## `foundation/{room}.py`\n")
        parts += [_exhibit(bug) for bug in bugs]
    return "\n".join(parts)


def _exhibit(bug: Bug) -> str:
    """One bug: its heading, the changed lines, what catches it, and where it was seen."""
    title = bug.name.partition(": ")[2] or bug.name
    changed = difflib.ndiff(bug.old.splitlines(), bug.new.splitlines())
    lines = "\n".join(line for line in changed if not line.startswith("?"))
    kind, _, test = bug.caught_by.partition(":")
    caught = f"Caught by the test `{test}`." if test else f"Caught by `python -m foundation {kind}`."
    place = f"`{bug.place}`" if "._" in bug.place else f"[`{bug.place}`](foundation.{bug.place})"
    seen = ""
    if bug.name in SIGHTINGS:
        issue, story = SIGHTINGS[bug.name]
        repository, number = issue.split("#")
        seen = f"\n:::{{note}}\n[{issue}](https://github.com/{repository}/issues/{number}): {story}\n:::\n"
    return f"### {title[0].upper()}{title[1:]}\n\n```diff\n{lines}\n```\n\nIn {place}. {caught}\n{seen}"

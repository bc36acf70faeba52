"""The page of the planted bugs: first those that happened in public, as stories; then the others, with their checks."""

import difflib
from typing import NamedTuple

from foundation.challenges.bugs import BUGS
from foundation.challenges.planting import Bug


class Sighting(NamedTuple):
    """A public issue in which a bug, or its nearest kin, was found."""

    issue: str
    """REPOSITORY#NUMBER on GitHub."""
    title: str
    symptom: str
    """What such a mistake shows. The issue itself may have found it in another way, such as by reading the code."""
    cause: str


SIGHTINGS = {
    "attention: no causal mask": Sighting(
        "keras-team/keras#23038",
        "A score too good to be true",
        "A metric rises towards its best value, because every position can look ahead. No error is raised.",
        "The mask was moved into the fast path. Where the layer took another path, as with dropout, there was no mask.",
    ),
    "router: plain gates get no gradient": Sighting(
        "davidmrau/mixture-of-experts#27",
        "The router that never learned",
        "The router's gradient is exactly 0 in every step, while the experts learn.",
        "With one choice a token, the softmax over that one choice is 1, whatever the router says.",
    ),
    "balance: a loss that ignores the routing": Sighting(
        "mindspore-ai/hyper-parallel#752",
        "A balance loss that does not move",
        "The balance loss is nearly the same number for balanced and for collapsed routing.",
        "Shares of E experts were multiplied with means of K choices. Broadcasting made the different lengths fit.",
    ),
    "balance: f is not divided by K": Sighting(
        "huggingface/transformers#43775",
        "A coefficient that means K times as much",
        "At perfect balance the loss is K and not 1, so a coefficient from a paper weighs K times as much.",
        "The shares of K choices were counted, and not divided by K.",
    ),
    "model: auxiliary losses not averaged over layers": Sighting(
        "huggingface/transformers#28255",
        "Two wrongs that cancel",
        "Two layers are unbalanced in opposite ways, and the balance loss calls the model balanced.",
        "The routers of all layers were pooled first. The product of shares and probabilities came after it.",
    ),
    "router: the gates' gradient is forgotten": Sighting(
        "labmlai/annotated_deep_learning_paper_implementations#95",
        "The gate on the wrong side of the expert",
        "The model trains, and its gates mean something else than in the paper.",
        "The gate multiplied the expert's input. An expert is not linear, so that is not its output times the gate.",
    ),
    "router: gates not renormalised": Sighting(
        "pytorch/torchtitan#1448",
        "A public model whose gradients are too large",
        "A public checkpoint is converted without an error, and its fine-tuning starts with a very high gradient norm.",
        "It was trained with gates that add up to 1, and was run with gates that do not.",
    ),
    "micro-batches: a mean of means": Sighting(
        "meta-pytorch/torchtune#1875",
        "A batch in parts that is another batch",
        "Accumulating over micro-batches gives another loss curve than the same sequences in one batch.",
        "Each micro-batch was divided by its own number of targets, and then averaged. Short ones weigh too much.",
    ),
    "all_reduce: R times too large": Sighting(
        "jax-ml/jax#3970",
        "The more devices, the larger the gradient",
        "On R devices every gradient is R times that of one device. Adam hides it, because it divides the scale out.",
        "The loss was summed over devices before it was differentiated: the sum has the sum as its adjoint.",
    ),
    "adamw: decay rescaled by the gradient": Sighting(
        "keras-team/keras#19051",
        "AdamW that was Adam",
        "Weights with large gradients are decayed less than those with small ones.",
        "AdamW inherited Adam's path for decay: the decay became a part of the gradient, which Adam rescales.",
    ),
    "layernorm: what subtracting the mean takes away is not taken out of d_n": Sighting(
        "tenstorrent/tt-metal#53204",
        "The loss still fell",
        "The gradient is wrong in every step, and the loss still falls.",
        "LayerNorm's gradient subtracts two sums. One of them was subtracted twice, in place of both.",
    ),
    "model: tied table without the head's share": Sighting(
        "paiml/entrenar#314",
        "A tied table that comes apart",
        "Embedding and head are called one table, and differ after the first step.",
        "They were two copies. Each was stepped with its own half of the gradient.",
    ),
    "grouped heads: neighbours read different key heads": Sighting(
        "onnx/onnx#7274",
        "Every head reads somebody else's keys",
        "An exported model with grouped heads gives other numbers than the model that it was made of.",
        "Key heads were tiled (0, 1, 0, 1) where they must be repeated (0, 0, 1, 1).",
    ),
    "decoding: rotary position one off": Sighting(
        "lucidrains/rotary-embedding-torch#11",
        "Every word is the first word",
        "The same vectors, rotated with another offset, come out as in the first call.",
        "The table of rotations was cached under a key that left the offset out.",
    ),
    "draft: judged as if every token were its surest": Sighting(
        "jaymody/speculative-sampling#3",
        "Faster, and another text",
        "Speculative decoding must not change what is written, and at temperature 0 the text changed.",
        "The draft took its likeliest token, and the test of acceptance assumed that the token had been drawn.",
    ),
    "kl: k1 as a loss": Sighting(
        "NVIDIA-NeMo/RL#2506",
        "A penalty that pulls nowhere",
        "The model drifts away from the reference, however large the coefficient of the penalty.",
        "The sampled divergence was differentiated without the score of the samples. On average nothing is left.",
    ),
    "kl: k3 where the forward KL is meant": Sighting(
        "verl-project/verl#2953",
        "The right mean, the wrong gradient",
        "The penalty has the value that it should have, and pulls towards another optimum.",
        "An estimator with the right mean was used as a loss. Its gradient is that of another divergence.",
    ),
}
"""Name of a planted bug -> where it was found in public."""

INTRODUCTION = """# The bug museum

A gradient that is wrong seldom stops a program. The loss still falls, a little slower. {seen} times it happened in
public code, written by people who know the subject well. A symptom is what such a mistake shows; how it was found
is in the linked issue. Each story ends with the check that catches the mistake here.

The same mistakes, or close relatives, are planted in `foundation/` by a test, one at a time, with others: {count} in
all. Each must be caught by name: by a row of the table (`uv run python -m foundation NAME`), or by a test of the
forward pass. `uv run python -m foundation hunt` plants one for you to find.

## Seen in public
"""


def page() -> str:
    """The page, as MyST Markdown: first the public cases as stories, then the other planted bugs by module."""
    bugs = {bug.name: bug for bug in BUGS}
    parts = [INTRODUCTION.format(count=len(BUGS), seen=len(SIGHTINGS))]
    parts += [_story(bugs[name], sighting) for name, sighting in SIGHTINGS.items()]
    parts.append("## Planted by us\n")
    modules: dict[str, list[Bug]] = {}
    for bug in BUGS:
        if bug.name not in SIGHTINGS:
            modules.setdefault(bug.place.partition(".")[0], []).append(bug)
    for module, planted in modules.items():
        parts.append(f"### `foundation/{module}.py`\n")
        parts += [f"#### {_title(bug)}\n\n{_change(bug)}\n{_check(bug)}\n" for bug in planted]
    return "\n".join(parts)


def _story(bug: Bug, sighting: Sighting) -> str:
    repository, number = sighting.issue.split("#")
    return (
        f"### {sighting.title}\n\n[{sighting.issue}](https://github.com/{repository}/issues/{number})\n\n"
        f"**Symptom.** {sighting.symptom}\n\n**Cause.** {sighting.cause} Planted here as `{bug.name}`:\n\n"
        f"{_change(bug)}\n**Check.** {_check(bug)}\n"
    )


def _title(bug: Bug) -> str:
    title = bug.name.partition(": ")[2] or bug.name
    return title if title[1:2] == " " else title[0].upper() + title[1:]  # `f` is a symbol


def _change(bug: Bug) -> str:
    """The changed lines, as a block of Markdown."""
    changed = difflib.ndiff(bug.old.splitlines(), bug.new.splitlines())
    lines = "\n".join(line for line in changed if not line.startswith("?"))
    return f"```diff\n{lines}\n```\n"


def _check(bug: Bug) -> str:
    """What catches the bug, and where it is."""
    kind, _, test = bug.caught_by.partition(":")
    caught = f"Caught by the test `{test}`" if test else f"Caught by `python -m foundation {kind}`"
    place = f"`{bug.place}`" if "._" in bug.place else f"[`{bug.place}`](foundation.{bug.place})"
    return f"{caught}, in {place}."

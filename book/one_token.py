"""The page "one token, forward and back": a token's way through router and experts to its loss, and the gradient's way
back, with the reason wherever it is exactly 0.

Every number comes from the hand-derived code of `foundation/`, for each state that a reader can choose. The page only
shows them.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from foundation.losses import cross_entropy_backward, cross_entropy_forward
from foundation.moe import assign_slots, capacity, combine_backward, moe_backward, moe_forward
from foundation.router import router_backward, router_forward

WORDS = ("the", "cat", "saw", "the", "dog", "and", "ran", "home")
"""The first seven are read; each has the next one as its target."""
EXPERTS, WIDTH, HIDDEN = 4, 4, 5
TOP_K = (1, 2)
ROOM = (0.5, 1.0, 2.0)
"""Capacity factors."""
BALANCE = (0.0, 0.5)
"""Weight of the balance loss."""
TEMPLATE = Path(__file__).parent / "one_token.html"


class Example(NamedTuple):
    """The weights of the layer and what stands around it."""

    x: Any
    """[1, T, D]: what the layer reads."""
    params: dict[str, Any]
    head: Any
    """[D, V]: from the stream to the logits of the next word."""
    targets: Any
    """[T]"""


def example(seed: int = 3) -> Example:
    """Random weights, in float64 where that is switched on. Both "the" are the same vector, so the router treats them
    alike."""
    random = np.random.default_rng(seed)
    vocabulary = sorted(set(WORDS))
    ids = [vocabulary.index(word) for word in WORDS]
    table = random.normal(size=(len(vocabulary), WIDTH))
    params = {
        "router": random.normal(size=(WIDTH, EXPERTS)),
        "w_in": random.normal(size=(EXPERTS, WIDTH, HIDDEN)),
        "w_out": random.normal(size=(EXPERTS, HIDDEN, WIDTH)) / 2,
    }
    head = random.normal(size=(WIDTH, len(vocabulary)))
    return Example(
        jnp.asarray(table[ids[:-1]])[None], jax.tree.map(jnp.asarray, params), jnp.asarray(head), jnp.array(ids[1:])
    )


def loss(params: dict[str, Any], given: Example, token: int, top_k: int, room: float, balance: float) -> Any:
    """The loss of one token: cross-entropy of its next word, and `balance` times the sequence's balance loss."""
    out, _ = moe_forward(given.x, params, top_k, room)
    logits = (given.x + out.y)[0, token] @ given.head
    value, _ = cross_entropy_forward(logits[None], given.targets[token][None])
    return value + balance * out.balance


def state(given: Example, token: int, top_k: int, room: float, balance: float) -> dict[str, Any]:
    """Everything that the page shows of one state. Gradients are those of this token's loss alone."""
    out, cache = moe_forward(given.x, given.params, top_k, room)
    logits = (given.x + out.y)[0, token] @ given.head
    value, loss_cache = cross_entropy_forward(logits[None], given.targets[token][None])
    d_y = jnp.zeros_like(out.y).at[0, token].set((cross_entropy_backward(jnp.array(1.0), loss_cache) @ given.head.T)[0])
    forward, places = _forward(given, cache, token, top_k, room)
    back = _back(given, cache, d_y, token, top_k, balance)
    rows = [a | {name: values[a["expert"]] for name, values in back.items()} for a in forward]
    for row in rows:
        row["why"] = _reasons(row, top_k, balance, any(other["fate"] == "kept" for other in rows))
    return {"rows": rows, "places": places, "loss": float(value), "probability": float(jnp.exp(-value))}


def _forward(given: Example, cache: tuple, token: int, top_k: int, room: float) -> tuple[list[dict[str, Any]], int]:
    """A row for each expert, and the places in each."""
    _, _, _, (answers, *_), _ = cache
    routing, _ = router_forward(given.x, given.params["router"], top_k)
    logits = (given.x @ given.params["router"])[0, token]
    places = capacity(given.x.shape[1], EXPERTS, top_k, room)
    _, keep = assign_slots(routing.experts, EXPERTS, places)
    chosen = [int(e) for e in routing.experts[0, token]]
    rows = []
    for expert, (logit, probability) in enumerate(zip(logits, jax.nn.softmax(logits), strict=True)):
        row = {"expert": expert, "logit": float(logit), "probability": float(probability)}
        row |= {"gate": None, "fate": "not chosen", "answer": None}
        if expert in chosen:
            k = chosen.index(expert)
            row |= {"gate": float(routing.gates[0, token, k]), "fate": "no room"}
            if keep[0, token, k]:
                row |= {"fate": "kept", "answer": _numbers(answers[0, token, k])}
        rows.append(row)
    return rows, places


def _back(given: Example, cache: tuple, d_y: Any, token: int, top_k: int, balance: float) -> dict[str, list[float]]:
    """Gradients by expert. What has several entries is told by its length."""
    _, _, _, combine_cache, _ = cache
    zero, weight = jnp.array(0.0), jnp.array(balance)
    d_h, d_gates = combine_backward(d_y, combine_cache)
    _, d_params = moe_backward(d_y, weight, zero, cache)
    # The router of x with the matrix W is the router of the logits x W with the identity: so d_x is d_logits there.
    routing, identity = router_forward(given.x @ given.params["router"], jnp.eye(EXPERTS), top_k)
    d_task, _ = router_backward(d_gates, zero, zero, identity)
    d_balance, _ = router_backward(jnp.zeros_like(d_gates), weight, zero, identity)
    by_expert = jnp.zeros(EXPERTS).at[routing.experts[0, token]].set(d_gates[0, token])
    squares = jnp.sum(d_params["w_in"] ** 2, axis=(1, 2)) + jnp.sum(d_params["w_out"] ** 2, axis=(1, 2))
    return {
        "d_router": _numbers(jnp.linalg.norm(d_params["router"], axis=0)),
        "d_balance": _numbers(d_balance[0, token]),
        "d_logit": _numbers(d_task[0, token]),
        "d_gate": _numbers(by_expert),
        "d_weights": _numbers(jnp.sqrt(squares)),
        "d_answer": _numbers(jnp.linalg.norm(d_h[0], axis=(1, 2))),
    }


def _numbers(values: Any) -> list[float]:
    """To six digits. A 0 is a 0 before and after."""
    return [float(f"{float(v):.6g}") for v in values]


def _reasons(row: dict[str, Any], top_k: int, balance: float, any_kept: bool) -> dict[str, str]:
    """Why gradients of a row are exactly 0, by name."""
    why = {}
    if row["fate"] == "not chosen":
        step = "Not chosen. A choice is a step: a small change of the router does not change it, so its slope is 0."
        why |= {"d_weights": step, "d_answer": step, "d_gate": "Not chosen, so there is no gate."}
        if top_k > 1:
            why["d_logit"] = "The gates are a softmax of the chosen logits alone, and this is not one of them."
    if row["fate"] == "no room":
        full = "Dropped: earlier words filled this expert. What it would have said is in no sum."
        why |= {"d_weights": full, "d_answer": full, "d_gate": "The gate multiplies nothing: the choice was dropped."}
    if not any_kept:
        why["d_logit"] = "No choice of this word was kept, so no gate changes the loss."
    if balance == 0:
        why["d_balance"] = "The balance loss is switched off."
    return why


def states(tokens: Sequence[int] = range(len(WORDS) - 1)) -> dict[str, Any]:
    """The states of some tokens, by "token/top_k/room/balance", with what is common to them."""
    choices = itertools.product(tokens, TOP_K, ROOM, BALANCE)
    with jax.enable_x64(True):
        given = example()
        found = {f"{t}/{k}/{room}/{b}": state(given, t, k, room, b) for t, k, room, b in choices}
    return {"words": WORDS, "top_k": TOP_K, "room": ROOM, "balance": BALANCE, "states": found}


def fragment(numbers: dict[str, Any]) -> str:
    """The interactive part of the page: markup, style, script and numbers, and nothing from anywhere else."""
    text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{numbers}}", text)


def page() -> str:
    """The page of the book, as MyST Markdown."""
    return f"{INTRODUCTION}\n```{{raw}} html\n{fragment(states())}\n```\n"


INTRODUCTION = """# One token, forward and back

One layer with four experts reads seven words. Pick a word. The first table follows it forward: the router gives each
expert a logit, the largest are chosen, and an expert answers if it has room. The second table follows the gradient of
this word's loss back, from right to left.

Wherever a gradient is exactly 0, the page says why. [Chapter
8](foundation/notebooks/08_router_and_its_gradient.ipynb) derives these zeros: they decide what a router can learn. All
numbers come from the hand-derived code in `foundation/`.
"""

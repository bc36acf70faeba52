"""Every routing decision of a long text: written to a file, and counted as papers on experts count.

    co-activation     of the tokens that chose expert i, the share that chose j too (Muennighoff et al. 2024, "OLMoE",
                      section 5.2)
    specialisation    of the choices in texts of one kind, the share that an expert has (section 5.3); and the same of
                      one token of the vocabulary, where `kinds` are tokens (section 5.4)
    hot set           share of the pairs (layer, expert) that were chosen within the first n tokens

The passes drop nothing, as evaluation and generation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.inference.traced_pass import check_routed, choice_mask, make_traced_pass, tokens_at_once
from moe_jax.inspection.trace import window_width, windows
from moe_jax.model.moe.layer import Mode
from moe_jax.runs.load import LoadedRun
from moe_jax.system.files import open_output
from moe_jax.system.terminal import progress_bar


class Decisions(NamedTuple):
    """The decisions of n tokens that follow one another."""

    first: int
    """Place of the first token in the whole stream."""
    tokens: np.ndarray
    """int [n]"""
    expert: np.ndarray
    """int [L, n, K]: the chosen experts, best first."""
    gate: np.ndarray
    """float32 [L, n, K]"""


def decisions(run: LoadedRun, tokens: np.ndarray) -> Iterator[Decisions]:
    """The decisions of a stream of token ids int [N], in windows of T. Raises UserError for a dense baseline."""
    check_routed(run.config.model)
    width = window_width(run.config.model, len(tokens))
    batch = max(min(tokens_at_once(run.config.model) // width, -(-len(tokens) // width)), 1)
    step, texts = make_traced_pass(run.graphdef, Mode.EVALUATE), list(windows(tokens, width))
    with progress_bar("routing the text", -(-len(texts) // batch)) as advance:
        for begin in range(0, len(texts), batch):
            group = texts[begin : begin + batch]
            padded = np.stack([window[:-1] for window, _ in group] + [group[0][0][:-1]] * (batch - len(group)))
            made = step(run.params, padded).decisions
            assert made is not None, "the model has routers"
            expert, gate = np.asarray(made.expert_index), np.asarray(made.gate)
            for b, (window, n) in enumerate(group):
                yield Decisions((begin + b) * width, window[:n], expert[:, b, :n], gate[:, b, :n])
            advance(1)


@dataclass(frozen=True)
class Counts:
    """What is counted of the decisions of N tokens. The kinds are names that the caller has given to the tokens."""

    config: ModelConfig
    kinds: list[str]
    by_kind: np.ndarray
    """int [kinds, L, E]: choices."""
    together: np.ndarray
    """int [L, E, E]: tokens that chose both. The diagonal counts the tokens that chose the expert."""
    first_seen: np.ndarray
    """int [L, E]: the tokens before the first one that chose the expert; N if none did."""
    tokens: int

    def hot_set(self, tokens: int) -> float:
        """Share of the pairs (layer, expert) that the first tokens chose."""
        return float((self.first_seen < min(tokens, self.tokens)).mean())

    def hot_sets(self) -> list[tuple[int, float]]:
        """`hot_set` of the first 1, 10, 100, ... tokens, and of all."""
        places = [10**n for n in range(10) if 10**n < self.tokens]
        return [(n, self.hot_set(n)) for n in [*places, self.tokens]]

    def coactivation(self) -> np.ndarray:
        """float [L, E, E]: entry [l, i, j] is the share of the tokens of expert i that chose j too."""
        own = np.diagonal(self.together, axis1=1, axis2=2)[..., None]
        return np.divide(self.together, own, out=np.zeros(self.together.shape), where=own > 0)

    def specialisation(self) -> np.ndarray:
        """float [kinds, L, E]: share of the choices of a kind that an expert has. 1 / E is even."""
        total = self.by_kind.sum(-1, keepdims=True)
        return np.divide(self.by_kind, total, out=np.zeros(self.by_kind.shape), where=total > 0)

    def describe(self) -> list[str]:
        """Lines for a person."""
        c, special = self.config, self.specialisation() * self.config.experts
        lines = [f"{c.layers} layers of {c.experts} experts, {c.routing.top_k} for a token"]
        curve = ", ".join(f"{share:.1%} after {n:,}" for n, share in self.hot_sets())
        lines.append(f"hot set, the share of all experts that were chosen so far: {curve}")
        if len(self.kinds) > 1:
            for kind, name in enumerate(self.kinds):
                layer, expert = divmod(int(special[kind].argmax()), c.experts)
                lines.append(
                    f"{name}: expert {expert} of layer {layer} has {special[kind].max():.1f} times an even share"
                )
        return lines

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        rounded = lambda array: np.round(array, 5).tolist()  # noqa: E731
        return {
            "tokens": self.tokens,
            "load": rounded(self.by_kind.sum(0) / (self.tokens * self.config.routing.top_k)),
            "hot_set": [[n, round(share, 5)] for n, share in self.hot_sets()],
            "specialisation": dict(zip(self.kinds, rounded(self.specialisation()), strict=True)),
            "coactivation": rounded(self.coactivation()),
        }


def count_decisions(
    run: LoadedRun,
    tokens: np.ndarray,
    kind: np.ndarray,
    kinds: Sequence[str],
    keep: Callable[[Decisions], None] | None = None,
) -> Counts:
    """Route a stream int [N] and count. `kind` int [N] has the number of each token's kind. Each part is given to
    `keep` once it is counted."""
    c = run.config.model
    shape = (c.layers, c.experts)
    by_kind, together = np.zeros((len(kinds), *shape), np.int64), np.zeros((*shape, c.experts), np.int64)
    first_seen = np.full(shape, len(tokens))
    for made in decisions(run, tokens):
        hits = choice_mask(made.expert, c.experts)
        together += np.einsum("lni,lnj->lij", hits, hits, dtype=np.int64)
        here = kind[made.first : made.first + len(made.tokens)]
        for k in np.unique(here):
            by_kind[k] += hits[:, here == k].sum(1)
        seen = np.where(hits.any(1), made.first + hits.argmax(1), len(tokens))
        first_seen = np.minimum(first_seen, seen)
        if keep:
            keep(made)
    return Counts(c, list(kinds), by_kind, together, first_seen, len(tokens))


def write_decisions(run: LoadedRun, texts: Sequence[tuple[str, Sequence[int]]], out: Path) -> Counts:
    """Route texts of token ids, each with the name of its kind, as one stream. Write every decision to `out`, an
    .npz file of `token` int32 [N], `expert` int16 [N, L, K] and `gate` float32 [N, L, K], and count. An error leaves no
    file."""
    kinds = list(dict.fromkeys(kind for kind, _ in texts))
    tokens = np.concatenate([np.asarray(ids, np.int32) for _, ids in texts])
    kind = np.concatenate([np.full(len(ids), kinds.index(name)) for name, ids in texts])
    shape = (len(tokens), run.config.model.layers, run.config.model.routing.top_k)
    arrays = {"token": tokens, "expert": np.empty(shape, np.int16), "gate": np.empty(shape, np.float32)}

    def keep(made: Decisions) -> None:
        rows = slice(made.first, made.first + len(made.tokens))
        arrays["expert"][rows], arrays["gate"][rows] = made.expert.swapaxes(0, 1), made.gate.swapaxes(0, 1)

    with open_output(out) as file:
        counts = count_decisions(run, tokens, kind, kinds, keep)
        np.savez_compressed(file, **arrays)
    return counts

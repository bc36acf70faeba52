"""The statistic behind "this expert is for this kind of token", against loops."""

import numpy as np
import pytest

from moe_jax.inspection import token_groups
from moe_jax.inspection.token_groups import preferred_groups


def by_loops(by_token: np.ndarray, counts: np.ndarray, groups: list[str]) -> dict[str, np.ndarray]:
    """The docstring of `preferred_groups`, one statistic at a time."""
    layers, experts, tokens = by_token.shape
    names = sorted(set(groups))
    scores = {}
    for layer in range(layers):
        shares = [by_token[layer, e] / counts for e in range(experts)]
        usual = np.mean([np.std(s) for s in shares])
        for e in range(experts):
            scores[layer, e] = (shares[e] - np.mean(shares[e])) / max(np.std(shares[e]), usual)

    def statistic(values: np.ndarray, labels: np.ndarray, name: str) -> float:
        n = int((labels == name).sum())
        return values[labels == name].sum() / np.sqrt(n * (tokens - n) / (tokens - 1))

    labels = np.array(groups)
    rng = np.random.default_rng(token_groups.SHUFFLE_SEED)
    largest = []
    for _ in range(token_groups.SHUFFLES):
        order = rng.permutation(tokens)
        largest.append(max(statistic(v, labels[order], name) for v in scores.values() for name in names))
    found = {name: np.zeros((layers, experts), bool) for name in names}
    for name in names:
        for place, values in scores.items():
            beaten = sum(top >= statistic(values, labels, name) - 1e-9 for top in largest)
            found[name][place] = (1 + beaten) / (1 + len(largest)) <= token_groups.GROUP_SIGNIFICANCE
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_groups_of_an_expert_by_loops(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, three experts. Some groups lean to an expert, so that some claims hold and others narrowly do not."""
    monkeypatch.setattr(token_groups, "SHUFFLES", 60)
    monkeypatch.setattr(token_groups, "GROUP_SIGNIFICANCE", 0.1)
    rng = np.random.default_rng(seed)
    groups = [str(g) for g in rng.choice(["a", "b", "c"], 30, p=[0.2, 0.3, 0.5])]
    counts = rng.integers(1, 40, 30)
    lean = np.array([[0.5, 0.1, 0.1], [0.1, 0.35, 0.3], [0.3, 0.3, 0.32]])
    chance = np.array([lean["abc".index(g)] for g in groups]).T * rng.uniform(0.5, 1.5, (2, 3, 30))
    by_token = rng.binomial(counts, np.minimum(chance, 1))
    by_token[:, 2] //= 7  # an expert that is chosen little
    found, expected = preferred_groups(by_token, counts, groups), by_loops(by_token, counts, groups)
    assert sorted(found) == sorted(expected)
    for name, preferred in expected.items():
        np.testing.assert_array_equal(found[name], preferred)
    claims = np.stack(list(expected.values()))
    assert claims.any()
    assert not claims.all()


def test_the_edge_of_significance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine shuffles four may reach the real statistic at the level of one half: (1 + 4) / (1 + 9)."""
    monkeypatch.setattr(token_groups, "SHUFFLES", 9)
    monkeypatch.setattr(token_groups, "GROUP_SIGNIFICANCE", 0.5)
    rng = np.random.default_rng(0)
    for _ in range(40):
        groups, counts = [str(g) for g in rng.choice(["a", "b"], 12)], rng.integers(1, 9, 12)
        by_token = rng.binomial(counts, 0.4, (1, 2, 12))
        found, expected = preferred_groups(by_token, counts, groups), by_loops(by_token, counts, groups)
        for name, preferred in expected.items():
            np.testing.assert_array_equal(found[name], preferred)

"""When a certificate passes, worked by hand. No model is compiled."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.certificates import arithmetic, causality, certify, on_mesh
from moe_jax.certificates.arithmetic import layer_arithmetic, step_arithmetic
from moe_jax.certificates.causality import PerturbationResult, count_changes
from moe_jax.config import RunConfig
from moe_jax.model.costs import bound_flops, count_parameters
from moe_jax.parallel.collectives import Collective
from tests.support import tiny

MODEL = tiny.config()


# Causality


@pytest.mark.parametrize(
    ("earlier", "other_row", "later", "causal", "leaky"),
    [
        (0, 0, 5, True, False),
        (1, 0, 5, False, True),
        (0, 1, 5, False, False),
        (1, 1, 5, False, False),
        (0, 0, 0, False, False),
        (1, 0, 0, False, False),
    ],
)
def test_what_is_causal_and_what_leaks(earlier: int, other_row: int, later: int, causal: bool, leaky: bool) -> None:
    found = PerturbationResult(earlier, other_row, later, 0.5)
    assert (found.causal(leaky=False), found.causal(leaky=True)) == (causal, leaky)
    assert str(found) == (
        f"{earlier} earlier outputs and {other_row} of the other sequence changed, 50% of the choices dropped"
    )


BEFORE, OTHER = np.zeros((2, 8), int), np.ones((2, 8), int)


@pytest.mark.parametrize(
    ("outputs", "earlier", "other_row", "later"),
    [
        (lambda x: x, 0, 0, 8),  # positions 2, 4, 6 and 7, in two rows: each changes its own output
        (lambda x: np.cumsum(x, 1), 0, 0, 2 * (6 + 4 + 2 + 1)),
        (lambda x: np.cumsum(x[:, ::-1], 1)[:, ::-1], 2 * (2 + 4 + 6 + 7), 0, 8),
        (lambda x: x[::-1], 0, 8, 0),
        (lambda x: 0 * x, 0, 0, 0),
    ],
    ids=["own", "later", "earlier", "other row", "nothing"],
)
def test_changes_are_counted_by_where_they_are(outputs: Any, earlier: int, other_row: int, later: int) -> None:
    def run(x: Any) -> Any:
        return outputs(x)[..., None], np.array([0.25, 0.75, 0.5])

    assert count_changes(run, BEFORE, OTHER) == (earlier, other_row, later, 0.75)


def test_a_short_text_is_changed_at_each_position_once() -> None:
    changed: list[tuple[int, ...]] = []

    def run(x: Any) -> Any:
        changed.append(tuple(np.argwhere(x)[0]) if x.any() else ())
        return x, np.zeros(1)

    count_changes(run, np.zeros((2, 2), int), np.ones((2, 2), int))
    assert changed == [(), (0, 0), (1, 0), (0, 1), (1, 1)]


def test_what_is_asked_of_a_model() -> None:
    assert "while choices are dropped" in causality._expected(MODEL)
    assert "nothing is dropped" in causality._expected(MODEL.with_routing(dispatch="blocks"))


# Arithmetic


def program(flops: int, largest: int = 1, **parts: int) -> Any:
    def flops_of(*scopes: str) -> int:
        return parts.get("experts", 0) if scopes == arithmetic._LAYER else parts[scopes[0]]

    biggest = SimpleNamespace(elements=largest, shape=(largest,))
    return SimpleNamespace(flops=flops, flops_of=flops_of, largest=lambda n: [biggest])


BATCH = 2 * MODEL.width // MODEL.seq_len + 1  # more tokens than twice the width
BOUND = bound_flops(MODEL, BATCH)
ROWS = MODEL.experts * BATCH * MODEL.seq_len * MODEL.width


@pytest.mark.parametrize(
    ("forward", "gradients", "passed"),
    [
        (BOUND, 3 * BOUND, [True, True]),
        (BOUND - 1, 3 * BOUND - 1, [False, False]),
        (int(1.02 * BOUND), int(3.09 * BOUND), [True, True]),
        (int(1.021 * BOUND), int(3.093 * BOUND), [False, False]),
    ],
)
def test_a_layer_has_its_bound_and_hardly_more(
    forward: int, gradients: int, passed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(config: Any, batch: int, with_gradients: bool, moe: Any = None) -> Any:
        assert batch == BATCH
        return program(gradients if with_gradients else forward, 10**9 if moe else 1)

    monkeypatch.setattr(arithmetic, "_layer_program", compiled)
    found = [c.passed for c in layer_arithmetic(MODEL) if c.name.startswith("arithmetic")]
    assert found == passed


@pytest.mark.parametrize(
    ("ours", "dense", "passed"), [(ROWS - 1, ROWS, True), (ROWS, ROWS, False), (1, ROWS - 1, False)]
)
def test_no_array_is_as_large_as_all_rows(ours: int, dense: int, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the test must see such an array in the all-experts form."""
    compiled = lambda *given: program(BOUND, dense if len(given) > 3 else ours)  # noqa: E731
    monkeypatch.setattr(arithmetic, "_layer_program", compiled)
    memory = [c for c in layer_arithmetic(MODEL) if c.name.startswith("memory")]
    assert [c.passed for c in memory] == [passed, passed]
    assert f"= {ROWS:,} <=" in memory[0].asked


CONFIG = RunConfig(model=MODEL)
TOKENS = 3 * MODEL.seq_len
STEP_BOUND = bound_flops(MODEL, 3)
GROUPS = count_parameters(MODEL)
NEEDED = {
    "attention": 6 * GROUPS["attention"].multiplied * TOKENS,
    "ffn": 3 * MODEL.layers * STEP_BOUND,
    "head": 6 * MODEL.vocab_size * MODEL.width * TOKENS,
}
ALL = sum(NEEDED.values())


def of_step(monkeypatch: pytest.MonkeyPatch, ours: Any, dense: Any, config: RunConfig = CONFIG) -> list[Any]:
    def programs(_: RunConfig, moe: Any = None) -> Any:
        return SimpleNamespace(compiled_step=lambda batch: SimpleNamespace(as_text=lambda: (moe is not None, batch)))

    monkeypatch.setattr(arithmetic.Programs, "of", programs)
    monkeypatch.setattr(arithmetic, "read_program", lambda text: {(False, 3): ours, (True, 3): dense}[text])
    return list(step_arithmetic(config, 3))


@pytest.mark.parametrize("part", ["attention", "ffn", "head", ""])
def test_every_part_of_a_step_has_what_it_needs(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = NEEDED | {"experts": NEEDED["ffn"]}
    if part:
        parts[part] -= 1
    dense = program(ALL + 100, experts=10**9)
    layers, whole = of_step(monkeypatch, program(ALL, **parts), dense)
    assert (layers.passed, whole.passed) == (True, part == "")
    assert f"{dense.flops / ALL:.2f} x as many" in whole.found
    assert "optimizer 0.00" in whole.found


@pytest.mark.parametrize("dense", [ALL, ALL - 1])
def test_a_step_has_fewer_operations_than_all_experts(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = NEEDED | {"experts": NEEDED["ffn"]}
    assert not of_step(monkeypatch, program(ALL, **parts), program(dense, experts=1))[1].passed


@pytest.mark.parametrize(
    ("remat", "factor", "passed"),
    [
        *((False, 1, True), (False, 1.03, True), (False, 1.032, False), (False, 4 / 3, False)),
        *((True, 4 / 3, True), (True, 1, False), (False, 0, False)),
    ],
)
def test_the_layers_of_a_step_have_their_bound(
    remat: bool, factor: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With remat, the forward pass of the layers runs twice: four thirds."""
    config = dataclasses.replace(CONFIG, execution=dataclasses.replace(CONFIG.execution, remat=remat))
    parts = NEEDED | {"experts": int(factor * NEEDED["ffn"]) + (factor == 4 / 3)}
    layers, _ = of_step(monkeypatch, program(ALL, **parts), program(10**9, experts=10**9), config)
    assert layers.passed == passed
    assert ("no product was found" in layers.found) == (factor == 0)


def test_the_bound_of_blocks_is_their_plan() -> None:
    """T 8, K 2, E 4: 3 sequences have 48 pairs; tests/benchmarks count the rows of the plan by hand."""
    blocks = MODEL.with_routing(dispatch="blocks")
    bound, name = arithmetic._bound(blocks, 3)
    rows = arithmetic.multiplied_rows(blocks, 3)
    assert bound == arithmetic.layer_flops(blocks, 3)
    assert name == f"the block plan ({rows / 48:.2f} rows for each pair)"
    assert arithmetic._bound(MODEL, 3) == (bound_flops(MODEL, 3), "the capacity bound")


# Which certificates a model gets


def test_a_dense_model_has_no_certificates_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer_causality", "layer_arithmetic", "step_arithmetic"):
        monkeypatch.setattr(certify, name, lambda *_, name=name: iter([name]))
    for name in ("model_causality", "compilations"):
        monkeypatch.setattr(certify, name, lambda *_, name=name: name)
    params: Any = {"blocks": [{"ffn": None}]}
    dense = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dense="active"))
    assert list(certify.certify(dense, params, 2)) == ["model_causality", "compilations"]
    assert list(certify.certify(CONFIG, params, 2)) == [
        *("layer_causality", "model_causality", "layer_arithmetic", "step_arithmetic", "compilations")
    ]


# Collectives


def sent(kind: Any, numbers: int, dtype: str = "f32", loops: tuple = ()) -> Collective:
    return Collective(kind, "", ((dtype, (numbers,)),), ((0, 1),), loops)


IDEAL = {"all-to-all": 400, "all-gather": 800, "all-reduce": 40_000}
RIGHT = [sent("all-to-all", 100), sent("all-gather", 100), sent("all-reduce", 6_000), sent("reduce-scatter", 4_000)]
MOST = int(on_mesh.SLACK * 40_000 + on_mesh.SCALARS) // 4


@pytest.mark.parametrize(
    ("found", "ideal", "verdicts"),
    [
        (RIGHT, IDEAL, "yes yes yes"),
        ([], dict.fromkeys(IDEAL, 0), "yes yes yes"),
        ([], IDEAL, "no no no"),
        ([*RIGHT, sent("all-to-all", 1)], IDEAL, "no yes yes"),
        ([*RIGHT, sent("all-gather", 1)], IDEAL, "yes no yes"),
        ([*RIGHT, sent("collective-permute", 1)], IDEAL, "yes no yes"),
        ([*RIGHT[:2], sent("all-reduce", 9_999)], IDEAL, "yes yes no"),
        ([*RIGHT[:2], sent("all-reduce", MOST)], IDEAL, "yes yes yes"),
        ([*RIGHT[:2], sent("all-reduce", MOST + 1)], IDEAL, "yes yes no"),
        ([*RIGHT[:2], sent("all-reduce", 20_000, "bf16")], IDEAL, "yes yes no"),
        ([*RIGHT[:2], sent("all-reduce", 5_000, loops=(2,))], IDEAL, "yes yes no"),
    ],
)
def test_what_devices_may_send(found: list[Collective], ideal: dict[str, int], verdicts: str) -> None:
    """An entry of f32 has four bytes."""
    passed = [certificate.passed for certificate in on_mesh.certify_collectives(found, ideal)]
    assert ["yes" if p else "no" for p in passed] == verdicts.split()

"""When a certificate passes, worked by hand. No model is compiled."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.certify import arithmetic, causality, mesh
from moe_jax.certify import model as all_claims
from moe_jax.certify.arithmetic import layer_arithmetic, step_arithmetic
from moe_jax.certify.causality import PerturbationResult, count_changes
from moe_jax.certify.collectives import Collective
from moe_jax.config import RunConfig, TrainConfig
from moe_jax.model.costs import layer_flops, step_products
from tests.support import tiny

MODEL = tiny.config()


# Causality


@pytest.mark.parametrize(
    ("earlier", "other_row", "later", "causal"),
    [(0, 0, 5, True), (1, 0, 5, False), (0, 1, 5, False), (0, 0, 0, False)],
)
def test_what_is_causal(earlier: int, other_row: int, later: int, causal: bool) -> None:
    found = PerturbationResult(24, 4, 8, 8, earlier, other_row, later, 0.5)
    assert found.causal == causal
    assert str(found) == (
        f"24 changes of one token, at each of 8 positions, in 4 sequences: {earlier} earlier outputs changed, and "
        f"{other_row} of the sequence that was left alone; 50% of the choices dropped"
    )
    assert ", at 6 of 8 positions," in str(found._replace(positions=6))


BEFORE, OTHER = np.arange(24).reshape(3, 8), 100 + np.arange(24).reshape(3, 8)


@pytest.mark.parametrize(
    ("outputs", "earlier", "other_row", "later"),
    [
        (lambda x: x, 0, 0, 2 * 8),  # 8 positions, each in two of three rows: each changes its own output
        (lambda x: np.cumsum(x, 1), 0, 0, 2 * (8 + 7 + 6 + 5 + 4 + 3 + 2 + 1)),
        (lambda x: np.cumsum(x[:, ::-1], 1)[:, ::-1], 2 * (0 + 1 + 2 + 3 + 4 + 5 + 6 + 7), 0, 2 * 8),
        (lambda x: x.sum(0, keepdims=True) + 0 * x, 0, 8, 2 * 8),
        (lambda x: 0 * x, 0, 0, 0),
    ],
    ids=["own", "later", "earlier", "other row", "nothing"],
)
def test_changes_are_counted_by_where_they_are(outputs: Any, earlier: int, other_row: int, later: int) -> None:
    def run(x: Any) -> Any:
        return outputs(x)[..., None], np.array([0.25, 0.75, 0.5])

    assert count_changes(run, BEFORE, OTHER) == (16, 3, 8, 8, earlier, other_row, later, 0.75)


def test_every_position_is_changed_in_all_rows_but_one() -> None:
    """To the token before or to another one. Every row is left alone at some positions, and changed at others."""
    rng = np.random.default_rng(5)
    before, other = rng.integers(0, 50, (4, 64)), rng.integers(50, 100, (4, 64))
    calls: list[np.ndarray] = []

    def run(x: Any) -> Any:
        calls.append(x.copy())
        return x, np.zeros(1)

    found = count_changes(run, before, other)
    changed = np.stack([call != before for call in calls[1:]])  # [call, row, position]
    assert (calls[0] == before).all()
    assert len(calls) == 1 + 64
    for t, call in enumerate(changed):
        assert not np.delete(call, t, axis=1).any()
        assert call[:, t].sum() == 3
    assert found.changes == changed.sum() == 3 * 64
    assert (changed.any(2).sum(0) > 32).all()
    assert (changed.any(2).sum(0) < 64).all()
    new = np.array([[calls[1 + t][row, t] for t in range(64)] for row in range(4)])
    copies = (new[:, 1:] == before[:, :-1])[changed[1:, :, :].any(2).T]
    assert 0.35 < copies.mean() < 0.65
    assert ((new == before) | (new == other) | (new == np.roll(before, 1, axis=1))).all()


def test_every_bit_of_an_output_counts() -> None:
    """-0.0 equals 0.0, and a NaN does not equal itself. The bits say the opposite."""
    a = np.array([[0.0, np.nan, 1.0, 2.0]], np.float32)[..., None]
    b = np.array([[-0.0, np.nan, 1.0, np.nextafter(np.float32(2), np.float32(3))]], np.float32)[..., None]
    assert causality._bits_differ(a, b).tolist() == [[True, False, False, True]]


def test_positions_where_a_queue_becomes_full() -> None:
    """Two slots. The queue has the places 0 1 2 3 at the tokens 0 3 4 7: token 3 takes the last slot, token 4 finds
    none, and their neighbours are 2 and 5."""
    place = np.array([0, 0, 0, 1, 2, 0, 0, 3]).reshape(1, 1, 8, 1)
    assert causality.crowded_positions(lambda: place, 2).tolist() == [2, 3, 4, 5]
    at_the_ends = np.array([1, 0, 0, 0, 0, 0, 0, 2]).reshape(1, 8, 1)
    assert causality.crowded_positions(lambda: at_the_ends, 2).tolist() == [0, 1, 6, 7]


def test_how_many_sequences_and_positions_are_tried() -> None:
    """Every position while that takes at most MOST_FLOPS operations; then evenly spaced ones and the crowded ones."""
    assert [causality.sequences_for(flops, 100) for flops in (1, 5e8, 1e9, 4e9)] == [6, 6, 3, 2]
    crowded = lambda: np.array([3, 4])  # noqa: E731
    assert causality.chosen_positions(1e10, 2, 100, crowded).tolist() == list(range(100))
    some = [0, 3, 4, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert causality.chosen_positions(1e11, 2, 100, crowded).tolist() == some


@pytest.mark.parametrize(("slots", "dropped", "passed"), [(4, 0.1, True), (4, 0.0, False), (None, 0.0, True)], ids=str)
def test_a_capacity_must_be_tested_under_drops(slots: int | None, dropped: float, passed: bool) -> None:
    causal = PerturbationResult(24, 4, 8, 8, 0, 0, 5, dropped)
    certificate = causality._certificate("causality: a layer", "a layer", causal, slots)
    assert certificate.passed == passed
    assert ("while choices are dropped" in certificate.asked) == (slots is not None)


# Arithmetic


def program(flops: int, unnamed: int = 0, **parts: int) -> Any:
    dots = [SimpleNamespace(op_name="", total=unnamed), SimpleNamespace(op_name="a/name", total=flops - unnamed)]
    return SimpleNamespace(flops=flops, flops_of=lambda part: parts[part], dots=dots)


BOUND = layer_flops(MODEL, 1)


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
    def compiled(config: Any, with_gradients: bool, moe: Any = None) -> Any:
        return program(gradients if with_gradients else forward)

    monkeypatch.setattr(arithmetic, "_layer_program", compiled)
    found = [c.passed for c in layer_arithmetic(MODEL) if c.name.startswith("arithmetic")]
    assert found == passed


CONFIG = RunConfig(model=MODEL, train=TrainConfig(optimizer="muon"))
NEEDED = step_products(CONFIG, 3)
ALL = sum(NEEDED.values())
NAMES = ["attention within the step", "expert layers within the step", "head within the step", "the whole step"]


def of_step(
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, int],
    attention: str | None = None,
    dense: int = 10**12,
    unnamed: int = 0,
) -> dict:
    """The certificates of a step of 3 sequences whose products are the `parts`, by name."""
    whole = program(sum(parts.values()), unnamed=unnamed, **parts)
    every = program(dense, **dict.fromkeys(parts, 10**9))

    def programs(_: RunConfig, moe: Any = None) -> Any:
        text = SimpleNamespace(as_text=lambda: (moe is not None, 3))
        return SimpleNamespace(compiled_step={3: text}.__getitem__, attention=SimpleNamespace(implementation=attention))

    monkeypatch.setattr(arithmetic.Programs, "of", programs)
    monkeypatch.setattr(arithmetic, "read_program", lambda text: {(False, 3): whole, (True, 3): every}[text])
    found = {c.name.removeprefix("arithmetic: "): c for c in step_arithmetic(CONFIG, 3)}
    assert list(found) == NAMES
    return found


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("factor", [0.0, 0.999, 1.0, 1.029, 1.031])
def test_every_part_of_a_step_has_what_it_needs_and_hardly_more(
    number: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ["attention", "ffn", "head", "rest"][number]
    found = of_step(monkeypatch, NEEDED | {part: int(factor * NEEDED[part])})
    bad = [] if 1 <= factor < 1.03 else [NAMES[number]]
    # What a named part lacks is looked for in the rest, where it is not.
    bad += ["the whole step"] if factor < 1 and part != "rest" else []
    assert [name for name, c in found.items() if not c.passed] == bad
    assert ("no product was found" in found["expert layers within the step"].found) == (part == "ffn" and not factor)


@pytest.mark.parametrize(("unnamed", "passed"), [(0, False), (999, False), (1000, True)])
def test_a_product_without_a_name_may_belong_to_any_part(
    unnamed: int, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 operations of attention are missing, and stand in the rest."""
    parts = NEEDED | {"attention": NEEDED["attention"] - 1000, "rest": NEEDED["rest"] + 1000}
    found = of_step(monkeypatch, parts, unnamed=unnamed)
    assert found["attention within the step"].passed == passed
    assert found["the whole step"].passed


def test_the_head_may_be_padded_where_the_device_pads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies 128 columns for a vocabulary of 13."""
    padded = NEEDED | {"head": NEEDED["head"] * 128 // 13}
    assert not of_step(monkeypatch, padded)["head within the step"].passed
    monkeypatch.setattr(arithmetic.jax, "default_backend", lambda: "gpu")
    assert of_step(monkeypatch, padded)["head within the step"].passed


@pytest.mark.parametrize(("form", "cudnn"), [(None, False), ("cudnn", True)])
def test_a_step_in_the_forms_of_a_card_is_compared_with_their_products(
    form: str | None, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(arithmetic, "step_products", lambda *_, cudnn: asked.append(cudnn) or NEEDED)
    of_step(monkeypatch, NEEDED, form)
    assert asked == [cudnn]


def test_what_bounds_blocks_is_their_plan() -> None:
    """T 8, K 2, E 4: a sequence has 16 pairs; tests/benchmarks count the rows of the plan by hand."""
    blocks = MODEL.with_routing(dispatch="blocks")
    rows = arithmetic.multiplied_rows(blocks, 1)
    assert f"({rows / 16:.2f} rows for each choice)" in arithmetic._what_bounds(blocks)
    assert arithmetic._what_bounds(MODEL) == "what all slots need"


# Which certificates a model gets


def test_a_dense_model_has_no_certificates_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer_causality", "layer_arithmetic", "step_arithmetic"):
        monkeypatch.setattr(all_claims, name, lambda *_, name=name: iter([name]))
    for name in ("model_causality", "compilations"):
        monkeypatch.setattr(all_claims, name, lambda *_, name=name: name)
    params: Any = {"blocks": [{"ffn": None}]}
    dense = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dense="active"))
    assert list(all_claims.certify(dense, params, 2)) == ["model_causality", "compilations"]
    assert list(all_claims.certify(CONFIG, params, 2)) == [
        *("layer_causality", "model_causality", "layer_arithmetic", "step_arithmetic", "compilations")
    ]


# Collectives


def sent(kind: Any, numbers: int, dtype: str = "f32", loops: tuple = ()) -> Collective:
    size = numbers * (4 if dtype == "f32" else 2) * (2 if kind == "all-gather" else 1)
    return Collective(kind, "", ((dtype, (numbers,)),), size, loops)


IDEAL = {"all-to-all": 400, "all-gather": 800, "all-reduce": 40_000}
RIGHT = [sent("all-to-all", 100), sent("all-gather", 100), sent("all-reduce", 6_000), sent("reduce-scatter", 4_000)]
MOST = int(mesh.SLACK * 40_000 + mesh.SCALARS) // 4


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
    passed = [certificate.passed for certificate in mesh.certify_collectives(found, ideal)]
    assert ["yes" if p else "no" for p in passed] == verdicts.split()

"""When a certificate passes, worked by hand. No model is compiled."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.certify import arithmetic, causality, formulas
from moe_jax.certify.arithmetic import step_arithmetic
from moe_jax.certify.causality import PerturbationResult, count_changes
from moe_jax.certify.formulas import step_products
from moe_jax.certify.hlo import Dot, Program
from moe_jax.config import RunConfig, TrainConfig
from moe_jax.training.programs import Programs
from tests.support import tiny

MODEL = tiny.config()


# Causality


@pytest.mark.parametrize(
    ("earlier", "other_row", "later", "causal"),
    [(0, 0, 5, True), (1, 0, 5, False), (0, 1, 5, False), (0, 0, 0, False)],
)
def test_what_is_causal(earlier: int, other_row: int, later: int, causal: bool) -> None:
    found = PerturbationResult(8, 8, earlier, other_row, later, 0.5)
    assert found.causal == causal
    assert str(found) == (
        f"one token changed at each of 8 positions: {earlier} earlier outputs changed, and "
        f"{other_row} of the sequence that was left alone; 50% of the choices dropped"
    )
    assert " at 6 of 8 positions:" in str(found._replace(positions=6))


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

    assert count_changes(run, BEFORE, OTHER) == (8, 8, earlier, other_row, later, 0.75)


def test_every_position_is_changed_in_all_rows_but_one() -> None:
    """To the token before or to another one. Every row is left alone at some positions, and changed at others."""
    rng = np.random.default_rng(5)
    before, other = rng.integers(0, 50, (4, 64)), rng.integers(50, 100, (4, 64))
    calls: list[np.ndarray] = []

    def run(x: Any) -> Any:
        calls.append(x.copy())
        return x, np.zeros(1)

    count_changes(run, before, other)
    changed = np.stack([call != before for call in calls[1:]])  # [call, row, position]
    assert (calls[0] == before).all()
    assert len(calls) == 1 + 64
    for t, call in enumerate(changed):
        assert not np.delete(call, t, axis=1).any()
        assert call[:, t].sum() == 3
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
    assert (causality._bits(a) != causality._bits(b)).ravel().tolist() == [True, False, False, True]


def test_how_many_positions_are_tried() -> None:
    """Every position while that takes at most MOST_FLOPS operations; then evenly spaced ones."""
    before, other = np.zeros((2, 2, 100), int)

    def run(x: Any) -> Any:
        return x[..., None], np.zeros(1)

    tried = [causality.perturbed("", run, before, other, flops, 6).found for flops in (1e10, 1e11)]
    assert [" at each of 100 positions" in tried[0], " at 10 of 100 positions" in tried[1]] == [True, True]
    assert causality.spaced(0, 99, 10).tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


@pytest.mark.parametrize(("slots", "dropped", "passed"), [(4, 0.1, True), (4, 0.0, False), (None, 0.0, True)], ids=str)
def test_a_capacity_must_be_tested_under_drops(
    slots: int | None, dropped: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causality, "count_changes", lambda *_: PerturbationResult(8, 8, 0, 0, 5, dropped))
    certificate = causality.perturbed("causality: a layer", max, BEFORE, OTHER, 1, slots)
    assert certificate.passed == passed
    assert ("while choices are dropped" in certificate.asked) == (slots is not None)


# Arithmetic


CONFIG = RunConfig(model=MODEL, train=TrainConfig(optimizer="muon"))
PROGRAMS = Programs.of(CONFIG)
NEEDED = step_products(CONFIG, 3)
NAMES = ["attention within the step", "expert layers within the step", "head within the step", "the whole step"]


def dot(flops: int, op_name: str = "", operands: str = "f32", precision: str = "highest") -> Dot:
    return Dot(op_name, operands, precision, flops, 1)


def of_step(monkeypatch: pytest.MonkeyPatch, parts: dict[str, int], unnamed: int = 0, attention: str = "") -> list[str]:
    """The claims that fail of a step of 3 sequences whose products are the `parts`."""
    dots = [dot(flops, f"step/{part}/dot") for part, flops in parts.items()]
    form: Any = SimpleNamespace(implementation=attention)
    monkeypatch.setattr(Programs, "of", lambda _: dataclasses.replace(PROGRAMS, attention=form))
    monkeypatch.setattr(Programs, "compiled_step", lambda *_: SimpleNamespace(as_text=lambda: "text"))
    monkeypatch.setattr(arithmetic, "read_program", {"text": Program([*dots, dot(unnamed)])}.__getitem__)
    *found, router = step_arithmetic(CONFIG, 3)
    assert [c.name.removeprefix("arithmetic: ") for c in found] == NAMES
    assert not router.passed
    return [c.name.removeprefix("arithmetic: ") for c in found if not c.passed]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_every_part_of_a_step_has_exactly_what_it_needs(
    number: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ["attention", "ffn", "head", "rest"][number]
    failed = of_step(monkeypatch, NEEDED | {part: NEEDED[part] + more})
    assert failed == ([] if more == 0 else ["the whole step"] if part == "rest" else [NAMES[number], "the whole step"])


@pytest.mark.parametrize(("unnamed", "failed"), [(999, [NAMES[0], NAMES[3]]), (1000, []), (1001, [NAMES[3]])])
def test_a_product_without_a_name_may_belong_to_any_part(
    unnamed: int, failed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of_step(monkeypatch, NEEDED | {"attention": NEEDED["attention"] - 1000}, unnamed) == failed


def test_the_head_is_padded_where_the_device_pads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies 128 columns for a vocabulary of 13. A CPU pads the last block of a prime number of tokens: with
    room for 5 of 23 tokens, 5 blocks of 5."""
    padded = NEEDED | {"head": NEEDED["head"] * 128 // 13}
    assert of_step(monkeypatch, padded) == [NAMES[2], NAMES[3]]
    with monkeypatch.context() as m:
        m.setattr(arithmetic.jax, "default_backend", lambda: "gpu")
        assert of_step(m, padded) == []
    monkeypatch.setattr(formulas, "HEAD_BYTES", 5 * 13 * 4)
    model = dataclasses.replace(MODEL, seq_len=23)
    programs = dataclasses.replace(PROGRAMS, config=dataclasses.replace(CONFIG, model=model))
    assert arithmetic.part_products(programs, 1)["head"] == 6 * 25 * 13 * model.width


def test_a_step_in_the_forms_of_a_card_is_compared_with_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_step(monkeypatch, step_products(CONFIG, 3, cudnn=True), attention="cudnn") == []
    assert NAMES[0] in of_step(monkeypatch, step_products(CONFIG, 3, cudnn=True))


@pytest.mark.parametrize(
    ("dots", "passed"),
    [
        ([dot(60, "a/router/b"), dot(40, "a/router/b", "f64"), dot(7, "a/head/b", "bf16", "default")], True),
        ([dot(60, "a/router/b"), dot(39, "a/router/b")], False),
        ([dot(60, "a/router/b"), dot(40, "a/router/b", precision="default")], False),
        ([dot(60, "a/router/b"), dot(40, "a/router/b", "bf16", "highest")], False),
        ([dot(60, "a/router/b"), dot(40, "a/router/b", "f32 x bf16", "highest")], False),
    ],
    ids=["wide", "one missing", "TF32", "bfloat16", "mixed"],
)
def test_the_precision_of_the_router(dots: list[Dot], passed: bool) -> None:
    assert arithmetic.router_precision(Program(dots), 100).passed == passed


# Which certificates a model gets

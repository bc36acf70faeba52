"""Every exercise takes its solution and no other answer, and answers anything at all with its hint."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundation import exercises, router
from foundation.lessons.questions import EXERCISES
from foundation.micro_batches import grouped_balance_forward


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "_WRONG", Counter())


@pytest.mark.parametrize("number", EXERCISES)
def test_exercise_takes_its_solution_and_no_other(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    right = exercises.solution(number)
    assert exercises.check(number, right) is True
    wrong = (lambda *arrays: 1.01 * right(*arrays)) if callable(right) else right * 1.5 + 0.7
    assert exercises.check(number, wrong) is False
    assert exercises.check(number, None) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("right.")
    assert said[1].startswith(f"{number}: not yet. ")
    assert said[2].endswith("not tried yet.")


def complains(*_: object) -> None:
    raise RuntimeError("first\nsecond")


@pytest.mark.parametrize("number", EXERCISES)
def test_any_answer_of_any_type_gets_the_hint(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    junk = ["seven", [1, 2], np.zeros((3, 9)), jnp.zeros(()), 1j, object(), math.nan, lambda: 0, complains,
            lambda *a: None, lambda *a: "text", lambda *a: np.zeros((7, 7)), lambda *a: a[0] * math.nan,
            lambda *a: a, lambda *a: 1j * a[0], {"a": 1}]  # fmt: skip
    for answer in junk:
        assert exercises.check(number, answer) is False
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(junk)
    for line in said:
        assert line.startswith(f"{number}: not yet. ")
    assert said[0].endswith(f"Hint: {EXERCISES[number].first_hint}")
    assert EXERCISES[number].hint not in said[0]
    for line in said[1:]:
        assert line.endswith("Hint: " + EXERCISES[number].hint)


FUNCTIONS = [n for n, exercise in EXERCISES.items() if callable(exercise.solution)]


@pytest.mark.parametrize("number", FUNCTIONS)
def test_a_function_is_shown_as_source_that_runs(number: str) -> None:
    """The text alone, with the imports of the questions, is a right answer."""
    shown = repr(exercises.solution(number))
    scope: dict = {"jax": jax, "jnp": jnp, "math": math}
    exec(shown, scope)
    name = EXERCISES[number].solution.__name__
    assert f"def {name}(" in shown
    assert exercises.check(number, scope[name]) is True


def test_gates_of_unit_length_against_autodiff() -> None:
    """Exercise 8.3, from the logits of all experts. Those that were not chosen get nothing."""
    z = jax.random.normal(jax.random.key(0), (6,), jnp.float64)
    d_g = jax.random.normal(jax.random.key(1), (3,), jnp.float64)
    chosen = jnp.argsort(-z)[:3]

    def loss(z: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)[chosen]
        return jnp.vdot(d_g, p / jnp.sqrt(jnp.sum(p**2)))

    ours = jnp.zeros(6).at[chosen].set(exercises.solution("8.3")(z[chosen], d_g))
    np.testing.assert_allclose(ours, jax.grad(loss)(z), atol=1e-14)


def test_balance_by_squared_shares_against_autodiff() -> None:
    """Exercise 8.4, with shares that are counted from the choices."""
    z = jax.random.normal(jax.random.key(2), (5, 6), jnp.float64)
    f = router.choice_share(jnp.argsort(-z)[None, :, :2], 6, z.dtype)[0]

    def loss(z: jax.Array) -> jax.Array:
        return 6 * jnp.sum(f**2 * jnp.mean(jax.nn.softmax(z), axis=0))

    np.testing.assert_allclose(exercises.solution("8.4")(z, f), jax.grad(loss)(z), atol=1e-14)


def test_weights_under_perplexity_against_autodiff() -> None:
    """Exercise 13.2, from a perplexity that is computed from all tokens."""
    counts, means = jnp.array([3, 1, 4]), jax.random.normal(jax.random.key(3), (3,), jnp.float64)
    off = jax.random.normal(jax.random.key(4), (8,), jnp.float64)
    own = jnp.repeat(jnp.arange(3), counts, total_repeat_length=8)
    off -= (jnp.zeros(3).at[own].add(off) / counts)[own]  # each micro-batch keeps its mean

    def perplexity(means: jax.Array) -> jax.Array:
        return jnp.exp(jnp.mean(means[own] + off))

    np.testing.assert_allclose(exercises.solution("13.2")(means, counts), jax.grad(perplexity)(means), rtol=1e-14)


def test_balance_by_sequence_against_batch_against_autodiff() -> None:
    """Exercise 13.3, with both losses of the chapter, from probabilities and choices."""
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(5), (6, 7, 4), jnp.float64))
    chosen = jnp.argsort(-probs)[..., :2]
    f = jnp.stack([router.choice_share(c[None], 4, probs.dtype)[0] for c in chosen])

    def difference(moved: jax.Array) -> jax.Array:
        moved_probs = probs + moved[:, None]
        by_sequence, by_batch = (grouped_balance_forward(moved_probs, chosen, groups)[0] for groups in (6, 1))
        return by_sequence - by_batch

    np.testing.assert_allclose(exercises.solution("13.3")(f), jax.grad(difference)(jnp.zeros((6, 4))), atol=1e-14)


@pytest.mark.parametrize(
    ("number", "answer"), [("2.1", lambda x, d_y: d_y @ x), ("5.1", lambda d_scores, q: d_scores @ q)]
)
def test_the_likeliest_mistake_gets_the_hint(number: str, answer: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A product whose shapes do not fit stops with a TypeError of jax."""
    assert exercises.check(number, answer) is False
    assert exercises.check(number, answer) is False
    first, second = capsys.readouterr().out.splitlines()
    assert "TypeError" in first
    assert "Hint" in second


def test_an_unknown_number_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    exercises.ask("7.11")
    assert exercises.check("7.11", 1.0) is None
    assert exercises.solution("7.11") is None
    assert [
        line.startswith("7.11: no such exercise; near it: 7.1") for line in capsys.readouterr().out.splitlines()
    ] == [True] * 3


def test_a_number_is_judged_relatively() -> None:
    judge = exercises.number(2.0**-20)
    assert not judge(2.0**-20)
    assert judge(2.1**-20) == f"{2.1**-20:.6g} is not the number."
    assert judge(2.0**-19)
    assert judge(0.0)
    assert judge(math.nan)

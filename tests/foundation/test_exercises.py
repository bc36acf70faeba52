"""Every exercise takes its solution and no other answer, and answers anything at all with its hint."""

import inspect
import math
import tomllib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundation import exercises, router
from foundation.exercises import EXERCISES
from foundation.lessons.solutions import SOLUTIONS
from foundation.micro_batches import grouped_balance_forward


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "_WRONG", {})


@pytest.mark.parametrize("number", EXERCISES)
def test_exercise_takes_its_solution_and_no_other(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    right = EXERCISES[number].solution
    assert exercises.check(number, right) is True
    wrong = (lambda *arrays: 1.01 * right(*arrays)) if callable(right) else right * 1.5 + 0.7
    assert exercises.check(number, wrong) is False
    assert exercises.check(number, None) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("right.")
    assert said[1].startswith(f"{number}: not yet. ")
    assert said[2] == f"Exercise {number}. {EXERCISES[number].question}"


def test_every_question_has_an_answer_and_no_answer_is_without_one() -> None:
    assert list(EXERCISES) == list(SOLUTIONS)


TABLE = tomllib.loads((Path(exercises.__file__).parent / "lessons" / "exercises.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", [number for number, texts in TABLE.items() if "mistakes" in texts])
def test_a_likely_mistake_is_told_by_its_own_words(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No other mistake, and none of the patterns, gives the same answer and comes first."""
    right = EXERCISES[number].solution
    letters = ", ".join(inspect.signature(right).parameters) if callable(right) else ""
    scope = {"jnp": jnp, **vars(math), **vars(jax.nn)}
    for formula, meaning in TABLE[number]["mistakes"]:
        answer = eval(f"lambda {letters}: {formula}" if letters else formula, scope)
        assert exercises.check(number, answer) is False
        assert f"{meaning}. Hint:" in capsys.readouterr().out


def test_a_sign_that_is_right_by_luck_is_wrong() -> None:
    """Exercise 10.2: the steepest step has the sign of its own gradient."""
    for step in (1.0, -1.0):
        assert EXERCISES["10.2"].judge(lambda g, s=step: jnp.where(jnp.abs(g) == jnp.max(jnp.abs(g)), s, 0.0))


def complains(*_: object) -> None:
    raise RuntimeError("first\nsecond")


@pytest.mark.parametrize("number", list(EXERCISES)[::5])
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
def test_a_function_is_shown_as_source_that_runs(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The text alone, with the imports of the questions, is a right answer."""
    exercises.solution(number)
    *helpers, answer = capsys.readouterr().out.rstrip().split("\n\n\n")
    scope: dict = {"jax": jax, "jnp": jnp, "math": math, "Array": jax.Array, "softmax": jax.nn.softmax}
    for helper in helpers:
        exec(helper, scope)
    if not answer.startswith("lambda "):
        exec(answer, scope)
        answer = EXERCISES[number].solution.__name__
    assert exercises.check(number, eval(answer, scope)) is True


def test_gates_of_unit_length_against_autodiff() -> None:
    """Exercise 8.3, from the logits of all experts. Those that were not chosen get nothing."""
    z = jax.random.normal(jax.random.key(0), (6,), jnp.float64)
    d_g = jax.random.normal(jax.random.key(1), (3,), jnp.float64)
    chosen = jnp.argsort(-z)[:3]

    def loss(z: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)[chosen]
        return jnp.vdot(d_g, p / jnp.sqrt(jnp.sum(p**2)))

    ours = jnp.zeros(6).at[chosen].set(EXERCISES["8.3"].solution(z[chosen], d_g))
    np.testing.assert_allclose(ours, jax.grad(loss)(z), atol=1e-14)


def test_balance_by_squared_shares_against_autodiff() -> None:
    """Exercise 8.4, with shares that are counted from the choices."""
    z = jax.random.normal(jax.random.key(2), (5, 6), jnp.float64)
    f = router.choice_share(jnp.argsort(-z)[None, :, :2], 6, z.dtype)[0]

    def loss(z: jax.Array) -> jax.Array:
        return 6 * jnp.sum(f**2 * jnp.mean(jax.nn.softmax(z), axis=0))

    np.testing.assert_allclose(EXERCISES["8.4"].solution(z, f), jax.grad(loss)(z), atol=1e-14)


def test_weights_under_perplexity_against_autodiff() -> None:
    """Exercise 13.2, from a perplexity that is computed from all tokens."""
    counts, means = jnp.array([3, 1, 4]), jax.random.normal(jax.random.key(3), (3,), jnp.float64)
    off = jax.random.normal(jax.random.key(4), (8,), jnp.float64)
    own = jnp.repeat(jnp.arange(3), counts, total_repeat_length=8)
    off -= (jnp.zeros(3).at[own].add(off) / counts)[own]  # each micro-batch keeps its mean

    def perplexity(means: jax.Array) -> jax.Array:
        return jnp.exp(jnp.mean(means[own] + off))

    np.testing.assert_allclose(EXERCISES["13.2"].solution(means, counts), jax.grad(perplexity)(means), rtol=1e-14)


def test_balance_by_sequence_against_batch_against_autodiff() -> None:
    """Exercise 13.3, with both losses of the chapter, from probabilities and choices."""
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(5), (6, 7, 4), jnp.float64))
    chosen = jnp.argsort(-probs)[..., :2]
    f = jnp.stack([router.choice_share(c[None], 4, probs.dtype)[0] for c in chosen])

    def difference(moved: jax.Array) -> jax.Array:
        moved_probs = probs + moved[:, None]
        by_sequence, by_batch = (grouped_balance_forward(moved_probs, chosen, groups)[0] for groups in (6, 1))
        return by_sequence - by_batch

    np.testing.assert_allclose(EXERCISES["13.3"].solution(f), jax.grad(difference)(jnp.zeros((6, 4))), atol=1e-14)


def by_autodiff(loss: Callable[..., jax.Array], place: int) -> Callable[..., jax.Array]:
    return lambda *arrays: jax.grad(loss, argnums=place)(*arrays)


def sink(p_b: jax.Array, d_o: jax.Array, o: jax.Array) -> jax.Array:
    """Exercise 11.3 from scores: three of them, whose values give this o, and b so that the sink has the share p_b."""
    scores, share = jnp.array([0.3, -1.0, 0.5]), jnp.abs(p_b) / (1.0 + jnp.abs(p_b))

    def row(share: jax.Array, d_o: jax.Array, o: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.exp(scores))
        b = jnp.log(total * share / (1.0 - share))
        v = jnp.outer(jnp.ones(3), o / (1.0 - share))
        return jax.grad(lambda b: d_o @ (jnp.exp(scores) / (total + jnp.exp(b)) @ v))(b)

    return jax.vmap(row)(share, d_o, o) / share * p_b


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("2.1", by_autodiff(lambda x, w, d_y: jnp.vdot(d_y, x @ w @ w.T), 1)),
        ("2.3", lambda x, d_y: jax.grad(lambda s: jnp.vdot(d_y, s * x))(2.0)),
        ("5.1", lambda q, k, d_s: jax.grad(lambda m: jnp.vdot(d_s, q @ m @ k.T))(jnp.ones((3, 2)))),
        ("5.3", lambda p, d_o: jax.grad(lambda u: jnp.vdot(d_o, jnp.outer(1 - p.sum(1), u)))(jnp.ones(3))),
        (
            "6.3",
            by_autodiff(
                lambda x, t, d: jnp.vdot(
                    d, jnp.stack([x[0] * jnp.cos(t) - x[1] * jnp.sin(t), x[0] * jnp.sin(t) + x[1] * jnp.cos(t)])
                ),
                1,
            ),
        ),
        ("7.3", by_autodiff(lambda a, u, d: jnp.vdot(d, jnp.maximum(a, 0) ** 2 * u), 0)),
        (
            "9.3",
            lambda d_x, x, d_l: jax.grad(lambda row: jnp.vdot(d_x, jnp.tile(2.0 * row, (3, 1))) + d_l @ (x @ row))(
                jnp.ones(4)
            ),
        ),
        ("11.3", sink),
        ("18.2", lambda x, q, d_y: jax.grad(lambda s: jnp.vdot(d_y, x @ (s[:, None] * q)))(jnp.ones(4))),
        ("19.2", lambda d_y: jax.grad(lambda x: jnp.vdot(d_y, jnp.cumsum(x, axis=0)))(jnp.ones((4, 8)))),
        ("19.4", by_autodiff(lambda x, g, u, w, d: jnp.vdot(d, jnp.sum((x @ g) * (x @ u) @ w, axis=0)), 0)),
        (
            "21.2",
            by_autodiff(lambda z, r: jnp.sum(jax.nn.softmax(z) * (r - 0.1 * jax.nn.log_softmax(z))), 0),
        ),
    ],
)
def test_a_solution_is_what_autodiff_gives(number: str, answer: Callable[..., jax.Array]) -> None:
    assert exercises.check(number, answer) is True


def test_a_fit_of_rows_is_the_best_one() -> None:
    """Exercise 10.3: another r, up or down, has the larger divergence."""
    g = jax.random.normal(jax.random.key(0), (3, 4))
    r = EXERCISES["10.3"].solution(g)

    def divergence(r: jax.Array) -> jax.Array:
        return jnp.sum(g**2 * jnp.log(g**2 / r[:, None]) - g**2 + r[:, None])

    assert all(divergence(r * factor) > divergence(r) for factor in (0.99, 1.01))
    np.testing.assert_allclose(jax.grad(divergence)(r), 0.0, atol=1e-12)


def test_only_another_answer_counts_as_another_try(capsys: pytest.CaptureFixture[str]) -> None:
    """A cell that runs once more makes the same function anew. The formula is told from the second answer on."""
    for body in ("d_y @ w", "d_y @ w", "x.T @ d_y @ w", "d_y @ w"):
        assert exercises.check("2.1", eval(f"lambda x, w, d_y: {body}")) is False
    first, again, other, first_again = capsys.readouterr().out.splitlines()
    exercise = EXERCISES["2.1"]
    assert first == again
    assert first.endswith(exercise.first_hint)
    assert other.endswith(exercise.hint)
    assert first_again.endswith(exercise.hint)
    for _ in range(2):
        exercises.check("0.3", 0.02)
    assert capsys.readouterr().out.count(EXERCISES["0.3"].first_hint) == 2


def test_an_unknown_number_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercises.check("7.11", 1.0) is None
    exercises.solution("7.11")
    assert [
        line.startswith("7.11: no such exercise; near it: 7.1") for line in capsys.readouterr().out.splitlines()
    ] == [True] * 2


def test_a_number_is_judged_relatively() -> None:
    judge = exercises.by_number(2.0**-20)
    assert not judge(2.0**-20)
    assert judge(2.1**-20) == f"{2.1**-20:.6g} is not the number."
    assert judge(2.0**-19)
    assert judge(0.0)
    assert judge(math.nan)


@pytest.mark.parametrize("solution", [187, Fraction(375, 2)])
def test_a_whole_number_and_a_fraction_are_met_exactly(solution: int | Fraction) -> None:
    judge = exercises.by_number(solution)
    assert not judge(float(solution))
    assert judge(1.0005 * float(solution)), "four digits are not enough"

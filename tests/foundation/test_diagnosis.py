"""Plausible wrong answers are told what their mistake is, in the terminal and in the notebooks."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from foundation.challenges.catalogue import CHALLENGES
from foundation.challenges.derive import stub
from foundation.challenges.diagnosis import Finding, examine
from foundation.challenges.reference import cases_of
from foundation.exercises import EXERCISES, check
from tests.foundation.wrong_answers import WRONG_ANSWERS, WRONG_FUNCTIONS

UNEXPLAINED = "no simple pattern"


@cache
def findings(operation: str) -> list[tuple[str, Finding]]:
    """What is said to each wrong answer, in the first case of the operation."""
    challenge = CHALLENGES[operation]
    case = next(cases_of(operation, challenge))
    said = []
    for body in WRONG_ANSWERS[operation]:
        lines = stub(operation, challenge).splitlines()
        del lines[next(i for i, line in enumerate(lines) if line.startswith("    return None")) :]
        scope: dict = {}
        exec("\n".join([*lines, *(f"    {line}" for line in body.splitlines())]), scope)
        said.append((body, case.judge(scope[challenge.backward](*case.arguments))))
    return said


@cache
def sentences(number: str) -> list[tuple[str, str]]:
    scope = {"jax": jax, "jnp": jnp, "softmax": jax.nn.softmax}
    return [(text, EXERCISES[number].judge(eval(text, scope))) for text in WRONG_FUNCTIONS[number]]


QUICK = ("softmax", "attention", "layernorm", "rmsnorm", "rope", "gelu", "silu", "linear")


def when(operation: str) -> list[pytest.MarkDecorator]:
    return [] if operation in QUICK else [pytest.mark.reliability]


@pytest.mark.parametrize("operation", [pytest.param(name, marks=when(name)) for name in WRONG_ANSWERS])
def test_a_wrong_answer_is_wrong_and_gets_a_reason(operation: str) -> None:
    for body, finding in findings(operation):
        assert finding.wrong.startswith("d_"), body
        assert finding.meaning, body


@pytest.mark.reliability
def test_at_most_five_of_the_plausible_answers_are_not_understood() -> None:
    answers = [(body, finding.meaning) for operation in WRONG_ANSWERS for body, finding in findings(operation)]
    answers += [pair for number in WRONG_FUNCTIONS for pair in sentences(number)]
    assert len(answers) >= 250
    assert all(text for _, text in answers)
    unexplained = [body for body, text in answers if UNEXPLAINED in text]
    assert len(unexplained) <= 5, "\n\n".join(unexplained)


NAMED = {
    ("softmax", "return p * d_p"): "the cross terms are forgotten",
    ("softmax", "axis=0"): "over axis 0",
    ("attention", "d_s @ k, d_s @ q"): "d_k needs d_S transposed",
    ("attention", "kept @ d_o"): "a matrix is not transposed: kept",
    ("attention", "= d_kept / math"): "the step back through softmax is left out",
    ("layernorm", "d_n - mean)"): "a summand is left out: the part with n",
    ("layernorm", "d_n = d_y\nmean"): "d_y is not multiplied by scale first",
    ("rope", "a * c - b * s, a * s + b * c"): "turned the same way, and not back",
    ("rope", "return d_y"): "rotate is left out",
    ("rope", "d_y[..., ::2]"): "neighbours are turned as pairs",
    ("gelu", "1.0 + _GELU_CUBIC"): "the 3 is forgotten",
    ("silu", "return d_y * s"): "s is treated as a constant",
    ("router", "= d_z_balance + d_z_z"): "the gates' gradient is forgotten",
    ("router", "softmax_cache[0] * d_p"): "the cross terms are forgotten",
    ("router", "d_z_gates + d_z_balance\n"): "a summand is left out",
    ("linear", "/ len(x), jnp.sum"): "a second time",
    ("sigmoid", "1.0 - y**2"): "y is squared, and should not be",
    ("dropout", "d_y / rate"): "rate stands alone, and should be subtracted from 1",
    ("attention", "q.shape[-2]"): "the size of a wrong axis: q.shape[-2]",
    ("layernorm", "jnp.sum(d_n, (0, 1))"): "d_y * scale stands where d_y belongs",
    ("rmsnorm", "d_n - jnp.mean(d_n"): "missing or too many",
}


@pytest.mark.parametrize(("operation", "part"), [pytest.param(*key, marks=when(key[0])) for key in NAMED])
def test_the_mistake_is_named(operation: str, part: str) -> None:
    said = [finding.meaning for body, finding in findings(operation) if part in body]
    assert said
    assert NAMED[operation, part] in said[0]


def test_a_mistake_and_a_factor_besides() -> None:
    """Two mistakes in one result: each is said."""
    said = [f.meaning for body, f in findings("rmsnorm") if "rrms = rrms * scale" in body]
    left_out, too_many = said[0].split("; and ")
    assert left_out == "a factor is left out: scale, which multiplies d_y"
    assert too_many == "a factor too many: scale is multiplied in once too often"
    said = [f.meaning for body, f in findings("layernorm") if "rstd * (d_n)" in body]
    assert said[0].count("a summand is left out") == 2


def test_of_one_number_a_ratio_says_nothing() -> None:
    assert UNEXPLAINED in examine("d_s", 1.7, 1.1).meaning
    assert "a sign is wrong" in examine("d_s", -1.1, 1.1).meaning


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("21.1", 0.75, "the second over the first"),
        ("14.1", 0.7, "the other part is asked for"),
        ("1.1", -4.0, "look at the signs"),
        ("3.3", 0.25, "one divided by it"),
        ("8.2", 3.0, "is not the number. Hint"),
        ("1.1", 7.0, "is not the number. Hint"),
        ("3.2", 1.0, "He's variance"),
        ("6.2", 7498.94, "one radian"),
        ("10.1", 1.0, "is not the number. Hint"),
        ("15.3", 2.7, "after a rejection"),
        ("5.3", lambda P, d: P.sum(1) @ d, "sum(P, axis=1) stands alone, and should be subtracted from 1"),
        ("8.4", lambda z, f: EXERCISES["8.4"].solution(z, f) / 6.0, "; a size of z is left out"),
        ("14.2", lambda z, h, d: (g := jax.nn.softmax(z)) * (1.0 - g) * (h @ d), "a sum is left out"),
        ("13.3", lambda f: EXERCISES["13.3"].solution(f) * 25 / 9, "a quotient is turned over"),
        ("19.2", lambda d_y: jnp.cumsum(d_y, axis=1), "along a wrong axis"),
        ("20.3", lambda n, size: EXERCISES["20.3"].solution(n, size) * jnp.log(2.0), "these are nats"),
        ("5.2", 0.5, "Give four digits"),
        ("5.2", 257 / 512, "the other part is asked for"),
        ("10.2", lambda g: jnp.where(g == jnp.max(g), -1.0, 0.0), "are off"),
        ("10.2", lambda g: -g / jnp.sum(jnp.abs(g)), "it is not the steepest"),
        ("15.2", lambda u, v: 1.0 - EXERCISES["15.2"].solution(u, v), "a proposal is rejected"),
        ("21.3", lambda z, q: jax.jacobian(jax.nn.softmax)(z) @ (jnp.log(jax.nn.softmax(z)) - q), "KL(pi || ref)"),
    ],
)
def test_one_answer_for_another(number: str, answer: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(number, answer) is False
    assert said in capsys.readouterr().out

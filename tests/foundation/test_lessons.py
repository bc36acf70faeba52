"""The lessons run, say what they claim, and fail where it is not so; `scalar_autograd` against jax."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from foundation import attention_mechanism, backprop_from_scratch, train_by_hand
from foundation.parity import Check, run
from foundation.scalar_autograd import Value, draw, layout, topological_order
from foundation.transformer import ModelSize, loss_and_gradient


def test_xor_is_learned_and_the_check_tells_right_from_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("agg")
    assert backprop_from_scratch.main(["--picture", str(tmp_path / "xor.png")]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 points right" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith(("  as", "  divided"))] == ["ok", "FAILED"]
    assert (tmp_path / "xor.png").stat().st_size > 10_000


def test_the_bug_learns_too_which_is_why_a_loss_curve_proves_nothing() -> None:
    lesson = backprop_from_scratch
    wrong = lesson.train(lesson.loss_backward_dividing_twice)
    assert wrong.losses[-1] < 0.1 * wrong.losses[0]
    params = lesson.init_params(jax.random.key(0))
    outcome = run(Check("xor", "twice", lesson.loss_forward, lesson.loss_backward_dividing_twice, (params,)))
    assert outcome.autodiff == pytest.approx(0.75)  # |g - g/4| / |g|


def test_attention_lesson_equals_flax_and_would_say_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("agg")
    assert attention_mechanism.main(["--picture", str(tmp_path / "attention.png")]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    # Rounding differs, so at a tolerance of zero the lesson must fail.
    monkeypatch.setattr(attention_mechanism, "TOLERANCE", 0.0)
    assert attention_mechanism.main([]) == 1


@pytest.mark.runs
def test_trained_by_hand_follows_autodiff() -> None:
    lesson = train_by_hand
    size = ModelSize(vocabulary=0, width=16, layers=2, experts=4, hidden=8)
    ours = lesson.train(loss_and_gradient, 50, size, positions=24)
    theirs = lesson.train(lesson.by_autodiff, 50, size, positions=24)
    assert lesson.largest_difference(ours, theirs) < 1e-9
    assert ours.losses[-1] < ours.losses[0] - 0.2
    assert len(ours.losses) == 50


def test_a_curve_has_at_least_two_losses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_by_hand.main(["--steps", "1"])
    assert caught.value.code == 2
    assert "--steps 1: must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_curves_part_where_a_gradient_is_wrong() -> None:
    lesson = train_by_hand
    size = ModelSize(vocabulary=0, width=16, layers=1, experts=4, hidden=8)

    def wrong(*args: object) -> tuple[jax.Array, dict]:
        loss, grads = loss_and_gradient(*args)  # type: ignore[arg-type]
        router = grads["blocks"][0]["moe"]["router"]
        grads["blocks"][0]["moe"]["router"] = jnp.zeros_like(router)
        return loss, grads

    ours = lesson.train(wrong, 10, size, positions=24)
    theirs = lesson.train(lesson.by_autodiff, 10, size, positions=24)
    assert lesson.largest_difference(ours, theirs) > 1e-6


def expression(a: Value, b: Value, c: Value) -> Value:
    return (a * b + c).tanh() / (1.0 + a.exp()) - (b**2 + 2.0).log() * 3.0 + (2.0 - c).relu() + 1.0 / b


def test_scalar_autograd_equals_jax() -> None:
    def in_jax(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        y = jnp.tanh(a * b + c) / (1.0 + jnp.exp(a)) - jnp.log(b**2 + 2.0) * 3.0
        return y + jax.nn.relu(2.0 - c) + 1.0 / b

    at = (0.3, -1.7, 0.9)
    values = [Value(v) for v in at]
    y = expression(*values)
    y.backward()
    assert y.data == pytest.approx(float(in_jax(*map(jnp.asarray, at))), rel=1e-14)
    for value, slope in zip(values, jax.grad(in_jax, argnums=(0, 1, 2))(*at), strict=True):
        assert value.grad == pytest.approx(float(slope), rel=1e-13)
    before = [value.grad for value in values]
    y.backward()  # starts from zero again
    assert [value.grad for value in values] == before


def test_a_value_used_twice_gets_both_gradients() -> None:
    a = Value(3.0)
    (a * a + a).backward()
    assert a.grad == 2 * 3.0 + 1.0


def test_a_long_sum_does_not_reach_the_recursion_limit() -> None:
    total = a = Value(1.0)
    for _ in range(5000):
        total = total + a
    total.backward()
    assert a.grad == 5001.0


def test_graph_goes_from_left_to_right_and_draws() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    a, b = Value(2.0, "a"), Value(3.0, "b")
    y = a * b + a
    order = topological_order(y)
    places = layout(y)
    for value in order:
        for parent, _ in value.edges:
            assert order.index(parent) < order.index(value)
            assert places[id(parent)][0] < places[id(value)][0]
    assert len(set(places.values())) == len(order)  # no two boxes in one place
    figure, axes = plt.subplots()
    draw(y, axes)
    texts = [text.get_text() for text in axes.texts]
    assert "a\nvalue 2\ngrad 0" in texts
    plt.close(figure)

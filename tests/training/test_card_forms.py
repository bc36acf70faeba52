"""The forms that a card takes, forced on the CPU: they train and write as the CPU's own forms do.

The short form has a small model. The long form, for a night, has `nano`, `story-cpu` and two layers of `seed-158m`, by
the checks of `doctor --gpu --test`.
"""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from moe_jax.config import RunConfig, TrainConfig
from moe_jax.inference.sampling import Sampling
from moe_jax.model.kernels.processor import FORMS
from moe_jax.planning import selftest
from moe_jax.training.programs import Programs
from tests.support import tiny

STEPS = 12


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """A program that is traced already would keep its forms."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def trained_and_written(dtype: str) -> tuple[np.ndarray, list[int]]:
    """The losses of some steps on one batch, and a text of the likeliest tokens."""
    jax.clear_caches()
    config = RunConfig(model=tiny.config(), train=TrainConfig(batch_size=4, grad_accum=2, warmup_steps=0))
    programs = Programs.of(config.override({("execution", "compute_dtype"): dtype}))
    shape = (2, 4, config.model.seq_len + 1)
    batch = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    state, losses = programs.state(programs.initial_params()), []
    for _ in range(STEPS):
        state, report = programs.step(state, batch)
        losses.append(float(report.metrics.loss))
    params, settings = programs.weights(state), Sampling(temperature=0)
    text = programs.decoder().stream(params, [1, 2], settings=settings, key=jax.random.key(0), stop=-1, limit=12)
    return np.array(losses), list(text)


@pytest.fixture(scope="module")
def exact() -> tuple[np.ndarray, list[int]]:
    return trained_and_written("float32")


def test_a_small_model_in_float32(exact: tuple[np.ndarray, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, and the same text."""
    monkeypatch.setenv(FORMS, "gpu")
    losses, text = trained_and_written("float32")
    assert exact[0][-1] < exact[0][0] - 0.1
    np.testing.assert_allclose(losses, exact[0], rtol=0, atol=5e-6)
    assert text == exact[1]


@pytest.mark.runs
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_small_model_in_16_bits(
    dtype: str, exact: tuple[np.ndarray, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding moves a router's choice, and the losses of a model that learns one batch by heart with it. They are
    about as far from those in float32 as the losses of the CPU's forms are."""
    own = np.linalg.norm(trained_and_written(dtype)[0] - exact[0])
    monkeypatch.setenv(FORMS, "gpu")
    assert np.linalg.norm(trained_and_written(dtype)[0] - exact[0]) < selftest.TIMES * own


@pytest.mark.slow
@pytest.mark.runs
@pytest.mark.timeout(3600)
def test_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMS, "gpu")
    dtypes = ["float32", "bfloat16", "float16"]
    for name, precisions in [("gradients", dtypes), ("text", dtypes), *(("steps", [dtype]) for dtype in dtypes)]:
        passed, detail = selftest.result(name, "nano", precisions)
        print(name, precisions, detail)
        assert passed, detail

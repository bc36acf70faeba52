"""Programs that are kept on disk: found by what they were made of, else made again; and the same text from both."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled

from moe_jax.inference.decode import Decoder
from moe_jax.inference.kept_programs import kept_programs
from moe_jax.inference.sampling import Sampling
from moe_jax.model.quantized import quantize
from tests.support import tiny


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    return tmp_path / "programs"


def double(x: dict[str, jax.Array]) -> jax.Array:
    return jnp.sin(2 * x["x"]) @ jnp.ones((3, 3))


class Made:
    """Compiles a program, and counts how often."""

    times = 0

    def __call__(self) -> list[Compiled]:
        self.times += 1
        return [jax.jit(double).lower({"x": jnp.zeros(3)}).compile()]

    def result(self, *facts: str) -> np.ndarray:
        (program,) = kept_programs(facts, self)
        return np.asarray(program({"x": jnp.arange(3.0)}))


EXPECTED = np.full(3, np.sin(2 * np.arange(3.0)).sum())


def test_a_program_is_made_once_for_the_same_facts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    for facts, times in ((["a"], 1), (["a"], 1), (["b"], 2), (["a", "b"], 3), (["ab"], 4), (["a"], 4)):
        np.testing.assert_allclose(made.result(*facts), EXPECTED, rtol=1e-6)
        assert made.times == times
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setenv("XLA_SOMETHING", "else")
    for _ in range(2):
        made.result("a")
    assert made.times == 5
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    made.result("a")
    assert made.times == 5
    assert len(list(folder.iterdir())) == 4  # the old program was replaced


@pytest.mark.parametrize("damage", [b"", b"\0" * 31, lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:]])
def test_a_damaged_file_counts_as_missing(folder: Path, damage) -> None:
    made = Made()
    made.result("a")
    (file,) = folder.iterdir()
    file.write_bytes(damage if isinstance(damage, bytes) else damage(file.read_bytes()))
    np.testing.assert_allclose(made.result("a"), EXPECTED, rtol=1e-6)
    assert made.times == 2


def test_a_folder_that_cannot_be_written_is_done_without(folder: Path) -> None:
    folder.write_text("a file")
    made = Made()
    for times in (1, 2):
        np.testing.assert_allclose(made.result("a"), EXPECTED, rtol=1e-6)
        assert made.times == times


def test_a_program_that_is_in_jax_own_cache_is_kept_whole(folder: Path) -> None:
    """XLA writes a program that it has read from its cache without some of its functions."""
    made = Made()
    assert jax.config.jax_enable_compilation_cache
    compilation_cache.reset_cache()
    made()  # jax keeps it
    jax.clear_caches()
    made.result("a")
    np.testing.assert_allclose(made.result("a"), EXPECTED, rtol=1e-6)
    assert made.times == 2
    assert jax.config.jax_enable_compilation_cache


@pytest.mark.parametrize("rounded", [False, True])
def test_the_text_of_a_later_process_is_the_same(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphdef, params = tiny.build(tiny.config())
    params = quantize(params, "int8") if rounded else params
    settings = {"settings": Sampling(1.0), "key": jax.random.key(3), "stop": -1, "limit": 3 * tiny.T}  # refills too
    texts = []
    for compiles in (False, True, True):
        decoder = Decoder(graphdef, tiny.T, tiny.V)
        if compiles:
            decoder.compile(params)
            monkeypatch.setattr(Decoder, "_compiled", None)  # the next one finds what this one has kept
        texts.append(list(decoder.stream(params, [1, 2, 3], **settings)))
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 3 * tiny.T

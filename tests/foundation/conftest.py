"""float64 for each test of this folder, and every shape annotation of `foundation` checked at run time."""

from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("foundation", "tests.support.typechecker.check")


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Put back afterwards: the tests of `moe_jax`, which may run in the same process, are about float32."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)

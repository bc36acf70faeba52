"""Settings shared by all tests: the CPU, one compilation cache for the session, shapes checked by beartype.

The folders under `tests` are packages, so two test files may have the same name, and all can import `tests.support`.
"""

# ruff: noqa: E402, the environment and the import hook must be set before the imports that they affect

import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = os.environ.get("MOE_JAX_TEST_PLATFORMS", "cpu")
_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # xdist's workers and subprocesses inherit it
    _CACHE = tempfile.mkdtemp(prefix="moe-jax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jaxtyping

import tests.support.typechecker  # noqa: F401

# This must come before moe_jax is imported. Checked are the modules with functions of arrays. training.state is not
# checked, because its dataclasses also hold what jax puts in place of arrays (shapes, specifications).
_CHECKED = ["inference", "model", "inspection", "certify", "training.evaluate", "training.loss", "training.step"]
jaxtyping.install_import_hook([f"moe_jax.{name}" for name in _CHECKED], "tests.support.typechecker.check")

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.support.programs import QUICK_COMPILER

# jax compiles a program at the first use of a shape, so the time of a single example means nothing.
settings.register_profile("moe-jax", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("moe-jax")


@pytest.fixture
def float64() -> Iterator[None]:
    """jax computes in float64 within the test."""
    with jax.enable_x64(True):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Most of a test's time is compiling, so the programs are compiled without LLVM's optimisations. At night they are
    compiled as users do: -m names `slow` then. So are programs for a card. `XLA_FLAGS= uv run pytest` does so too."""
    suite, flags = config.option.markexpr, os.environ.get("XLA_FLAGS")
    devices_only = suite == "parallel" and QUICK_COMPILER not in (flags or "")
    if "slow" not in suite and "MOE_JAX_TEST_PLATFORMS" not in os.environ and (flags is None or devices_only):
        os.environ["XLA_FLAGS"] = f"{flags or ''} {QUICK_COMPILER}".strip()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `slow` run only if -m names `slow`. So `-m reliability` runs the short form of that suite."""
    if "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_unconfigure() -> None:
    if _CACHE is not None:
        shutil.rmtree(_CACHE, ignore_errors=True)

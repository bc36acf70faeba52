"""Tests marked `parallel` need eight devices. Without them they fail: a skipped test would assert nothing."""

import jax
import pytest

from tests.parallel.made import DEVICES


@pytest.fixture(autouse=True)
def eight_devices(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("parallel") and jax.device_count() != DEVICES:
        pytest.fail(
            f"{jax.device_count()} devices, must be {DEVICES}: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES} uv run pytest -m parallel"
        )

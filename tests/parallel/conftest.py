"""Tests marked `parallel` need eight devices. Without them they fail: a skipped test would assert nothing."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.parallel.made import DEVICES
from tests.support import saved_run


@pytest.fixture(autouse=True)
def eight_devices(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("parallel") and jax.device_count() != DEVICES:
        pytest.fail(
            f"{jax.device_count()} devices, must be {DEVICES}: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES} uv run pytest -m parallel"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a text, in which small runs of one or more processes train quickly."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("<|endoftext|>".join(f"{saved_run.STORY}{i}" for i in range(80)))
    with saved_run.quick_training(folder / "cache") as patch:
        patch.setattr("moe_jax.inspection.report.report_run", lambda files: ["no report"])
        patch.setattr("moe_jax.training.session.SAMPLE_TOKENS", 8)
        yield folder

"""Whole runs of the tests in this folder are quick, and share one cache of their data in a file. They write samples in
files with SAMPLES = True."""

from collections.abc import Iterator

import pytest

from tests.support import saved_run


@pytest.fixture(scope="module", autouse=True)
def quick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    samples = getattr(request.module, "SAMPLES", False)
    with saved_run.quick_training(tmp_path_factory.mktemp("cache"), samples):
        yield

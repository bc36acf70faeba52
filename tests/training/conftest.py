"""Whole runs of the tests in this folder are quick, and share one cache of their data in a file."""

from collections.abc import Iterator

import pytest

from tests.support import saved_run


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with saved_run.quick_training(tmp_path_factory.mktemp("cache")):
        yield

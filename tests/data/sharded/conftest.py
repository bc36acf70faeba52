"""Small parts, made by one process."""

from pathlib import Path

import pytest

from moe_jax.config import DataConfig
from moe_jax.data import text_plan, token_store
from tests.data.sharded.stores import KINDS, PART, data_of


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_plan, "PART_BYTES", PART)
    monkeypatch.setattr(token_store, "usable_cores", lambda: 1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(text_plan, "PART_BYTES", KINDS[request.param])
    return request.param


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return data_of("byte", tmp_path)

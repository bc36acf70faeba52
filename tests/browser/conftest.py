"""One browser, one report, and stand-in servers for the tests of the pages.

They need Debian's `chromium` (or another Chromium on the PATH); without one they are skipped.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_jax.inspection.report import write_report
from tests.browser.opened import HOSTILE, WRITING, Opened
from tests.browser.served import Served
from tests.support import saved_run
from tests.support.stand_in_server import StandIn, stand_in

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved_run.save_run(tmp_path_factory.mktemp("browser"))
    return write_report(folder, folder / "report" / "page.html", text=HOSTILE + WRITING)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run `uv sync`")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; apt-get install chromium")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:
    opened = Opened(browser, written)
    yield opened
    opened.page.close()


@pytest.fixture
def says() -> Iterator[StandIn]:
    """A server without a model."""
    with stand_in() as server:
        yield server


@pytest.fixture
def served(browser: Any, says: StandIn) -> Iterator[Served]:
    served = Served(browser, says).ready()
    yield served
    served.page.close()

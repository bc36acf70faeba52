"""Requests of random kinds at once and in turn: every text is `generate`'s, no slot is lost, memory does not grow.

`MOE_JAX_REQUESTS=seed` draws other requests for the long form.
"""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from tests.reliability.requests_of_kinds import Asked, Judge, draw_requests
from tests.reliability.served import Oracle, Served

pytestmark = pytest.mark.reliability
FEW, MANY = 160, 2000
AT_ONCE = (1, 2, 5, 20, 40)
"""Clients that ask at the same time, in turn."""
WARM = 0.3
"""Share of the requests after which memory may no longer grow."""


def resident_bytes(server: Served) -> int:
    """Memory of the server's process. 0 where the system does not say."""
    status = Path(f"/proc/{server.process.pid}/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def wait_until_free(server: Served) -> None:
    end = time.monotonic() + 60
    while not server.free():
        assert time.monotonic() < end, server.ask("/health")
        time.sleep(0.02)


def serve_all(server: Served, asked: list[Asked], seed: int) -> tuple[list[Any], list[int]]:
    """The answers, in order, and the server's memory after each group of requests."""
    rng, answers, sizes = random.Random(seed), [], []
    while len(answers) < len(asked):
        group = asked[len(answers) : len(answers) + rng.choice(AT_ONCE)]
        with ThreadPoolExecutor(len(group)) as pool:
            answers += list(pool.map(lambda request: request.send(server), group))
        wait_until_free(server)
        sizes += [resident_bytes(server)] * len(group)
    return answers, sizes


def check(server: Served, count: int, seed: int) -> None:
    oracle = Oracle(server.run)
    asked = draw_requests(oracle.tokenizer, count, seed)
    answers, sizes = serve_all(server, asked, seed)
    again = [request.send(server) for request in asked[::5]]
    judge = Judge(oracle)
    for request, answer in zip(asked, answers, strict=True):
        judge.judge(request, answer)
    for request, first, second in zip(asked[::5], answers[::5], again, strict=True):
        judge.same(request, first, second)
    warm = max(sizes[: int(WARM * count)])
    growth = (max(sizes[-20:]) - warm) / warm if warm else 0.0
    assert not judge.wrong, judge.wrong[:5]
    assert judge.counts["ties decided the other way"] <= judge.counts["texts compared with generate"] // 50
    assert growth <= 0.01, f"memory {warm:,} bytes after {int(WARM * count)} requests, then {max(sizes[-20:]):,}"


def test_requests_of_every_kind(served: Served) -> None:
    check(served, FEW, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_requests(served: Served) -> None:
    check(served, MANY, int(os.environ.get("MOE_JAX_REQUESTS", "1")))

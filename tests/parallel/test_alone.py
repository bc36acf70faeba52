"""How processes find each other and compare what they have, with jax's service invented: no second process starts."""

import json
import socket
import threading
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.train import ProcessGroup
from moe_jax.parallel import processes


class Service:
    """jax's store of texts, in which other processes have written already."""

    def __init__(self, others: list[str]) -> None:
        self.others, self.own, self.waits = others, list[tuple[str, str]](), list[tuple[str, int]]()

    def key_value_set(self, name: str, text: str) -> None:
        self.own.append((name, text))

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        """In the order of names, in which 10 comes before 2."""
        texts = [(f"{folder}/{n}", text) for n, text in enumerate(self.others, 1)]
        return sorted([*texts, *((name, text) for name, text in self.own if name.startswith(folder))])

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        self.waits.append((name, milliseconds))


def joined(others: list[str], monkeypatch: pytest.MonkeyPatch) -> Service:
    """The service as process 0 of a group sees it."""
    service = Service(others)
    state = SimpleNamespace(num_processes=len(others) + 1, process_id=0, client=service)
    monkeypatch.setattr(processes.distributed, "global_state", state)
    return service


def test_a_process_alone_waits_for_nobody() -> None:
    assert (processes.first(), processes.several()) == (True, False)
    assert processes.exchange("a") == ["a"]
    processes.barrier()
    processes.agree_on({"--lr": 1.0})
    assert [processes.stop_reason(signal) for signal in (None, 15)] == [None, 15]
    with processes.joined(None):
        assert not processes.several()


def test_texts_come_in_the_order_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every exchange and every barrier has a name of its own."""
    service = joined([f"text {n}" for n in range(1, 12)], monkeypatch)
    assert (processes.first(), processes.several()) == (True, True)
    for _ in range(2):
        assert processes.exchange("text 0", 2.5) == [f"text {n}" for n in range(12)]
    processes.barrier()
    assert len({name.rpartition("/")[0] for name, _ in service.own}) == 2
    names, limits = zip(*service.waits, strict=True)
    assert (len(set(names)), limits) == (3, (2500, 2500, 7 * 24 * 3600 * 1000))


def test_the_first_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"--lr": 0.5, "--seed": 3}
    joined([json.dumps(facts), json.dumps(facts | {"--seed": 4, "more": 1})], monkeypatch)
    with pytest.raises(ConfigError, match=r"^--seed: 4 in process 2, and 3 in process 0; all processes of a run must"):
        processes.agree_on(facts)
    joined([json.dumps(facts)], monkeypatch)
    processes.agree_on(facts)
    joined([json.dumps({"--lr": 0.5})], monkeypatch)
    with pytest.raises(ConfigError, match=r"^--seed: None in process 1, and 3 in process 0"):
        processes.agree_on(facts)


def test_programs_are_compared_but_not_their_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[dict[str, Any], float]] = []
    monkeypatch.setattr(processes, "agree_on", lambda facts, seconds: asked.append((facts, seconds)))
    config = RunConfig()
    processes.check_same_program(config, resumed=True)
    assert asked == []
    joined(["{}"], monkeypatch)
    processes.check_same_program(config, resumed=True)
    ((facts, seconds),) = asked
    assert (facts["a run in --out"], facts["--lr"], seconds) == (True, config.train.lr, 45)
    assert "--out" not in facts
    assert facts["version of jax"] == jax.__version__


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What jax is asked to connect, which it does at once."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: asked.append({"shutdown": True}))
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append({name: value}))
    return asked


TIMES = {"initialization_timeout": 90, "heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
"""As docs/scaling.md says: 45 seconds for all to connect, before jax gives up, and 10 without a sign of life."""


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("local", [True, False])
def test_what_jax_is_asked(index: int, local: bool, connected: list[dict[str, Any]]) -> None:
    """Only a group on one machine listens on its own address only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{'127.0.0.1' if local else 'host.example'}:{free.getsockname()[1]}"
    group = ProcessGroup(2, index, address)
    assert group.local == local
    with processes.joined(group):
        pass
    named = {"coordinator_address": address, "num_processes": 2, "process_id": index}
    named |= {"cluster_detection_method": "deactivate"} | ({"coordinator_bind_address": address} if local else {})
    assert connected == [{"jax_enable_preemption_service": False}, named | TIMES, {"shutdown": True}]
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "nobody is said to be missing later"


def test_of_a_cluster_jax_finds_the_rest(connected: list[dict[str, Any]]) -> None:
    with processes.joined(ProcessGroup(0, 0, "", detected=True)):
        pass
    assert connected[1] == TIMES


@pytest.mark.parametrize("local", [True, False])
def test_the_port_of_process_0_must_be_free(local: bool, connected: list[dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.1" if local else "", 0)) as listening:
        address = f"{'127.0.0.1' if local else 'host.example'}:{listening.getsockname()[1]}"
        said = rf"^--coordinator-address {address}: process 0 cannot listen there \(Address already in use\); name a"
        with pytest.raises(UserError, match=said), processes.joined(ProcessGroup(2, 0, address)):
            pass
        assert len(connected) == 1, "jax was not asked"
        with processes.joined(ProcessGroup(2, 1, address)):
            pass


@pytest.mark.parametrize("detected", [True, False])
def test_what_jax_says_becomes_one_line(detected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no\n  way " + "x" * 400)

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    group = ProcessGroup(0, 0, "", detected=True) if detected else ProcessGroup(2, 1, "h:1")
    with pytest.raises(UserError) as failure, processes.joined(group):
        pass
    name, remedy = ("cluster", "start it by srun") if detected else ("h:1", "give every process the same free address")
    said = "no way " + "x" * 293
    assert str(failure.value).startswith(
        f"--coordinator-address {name}: JAX cannot connect the processes ({said}); {remedy}"
    )
    assert processes._text(ValueError()) == "ValueError"


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    processes._end("--coordinator-address h:1: not all processes have answered")
    assert ended == [1]
    assert capsys.readouterr().err == (
        "error: --coordinator-address h:1: not all processes have answered within 45 s; start all at about the same "
        "time\n"
    )


def test_numbers_of_one_process() -> None:
    assert [processes.largest(n) for n in (0, 15, -3)] == [0, 15, -3]
    x = jax.numpy.arange(6.0).reshape(2, 3)
    assert processes.is_here(x)
    assert processes.is_here(np.zeros(2))
    np.testing.assert_array_equal(processes.whole(x), np.arange(6.0).reshape(2, 3))
    placed = processes.placed(np.arange(3), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(placed, [0, 1, 2])

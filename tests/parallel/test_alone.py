"""A process alone waits for nobody; and what jax is asked to connect several, without a second process."""

import socket
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import ProcessGroup, UserError
from moe_jax.parallel import processes


def test_a_process_alone_waits_for_nobody() -> None:
    assert (processes.is_process_zero(), processes.is_multi_process()) == (True, False)
    assert processes.exchange_texts("a") == ["a"]
    processes.barrier()
    processes.agree_on({"--lr": 1.0})
    assert [processes.stop_reason(signal) for signal in (None, 15)] == [None, 15]
    with processes.process_group(ProcessGroup()):
        assert not processes.is_multi_process()


def test_arrays_of_one_process() -> None:
    x = jax.numpy.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(processes.gather_to_host(x), np.arange(6.0).reshape(2, 3))
    placed = processes.place(np.arange(3), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(placed, [0, 1, 2])


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What jax is asked to connect, which it does at once."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: asked.append({"shutdown": True}))
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append({name: value}))
    return asked


TIMES = {"initialization_timeout": 45, "heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
"""As docs/scaling.md says: 45 seconds for all to connect, and 10 without a sign of life."""


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("local", [True, False])
def test_what_jax_is_asked(index: int, local: bool, connected: list[dict[str, Any]]) -> None:
    """Only a group on one machine listens on its own address only. Of a cluster jax finds the rest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{'127.0.0.1' if local else 'host.example'}:{free.getsockname()[1]}"
    group = ProcessGroup(2, index, address)
    assert group.local == local
    with processes.process_group(group):
        pass
    named = {"coordinator_address": address, "num_processes": 2, "process_id": index}
    named |= {"cluster_detection_method": "deactivate"} | ({"coordinator_bind_address": address} if local else {})
    assert connected == [{"jax_enable_preemption_service": False}, named | TIMES, {"shutdown": True}]
    with processes.process_group(ProcessGroup(coordinator_address="cluster")):
        pass
    assert connected[4] == TIMES


def test_the_port_of_process_0_must_be_free(connected: list[dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        said = rf"^--coordinator-address {address}: process 0 cannot listen there \(Address already in use\); name a"
        with pytest.raises(UserError, match=said), processes.process_group(ProcessGroup(2, 0, address)):
            pass
        assert len(connected) == 1, "jax was not asked"


@pytest.mark.parametrize("detected", [True, False])
def test_what_jax_says_becomes_one_line(detected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no\n  way " + "x" * 400)

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    group = ProcessGroup(coordinator_address="cluster") if detected else ProcessGroup(2, 1, "h:1")
    with pytest.raises(UserError) as failure, processes.process_group(group):
        pass
    name, remedy = ("cluster", "start it by srun") if detected else ("h:1", "give every process the same free address")
    said = "no way " + "x" * 293
    assert str(failure.value).startswith(
        f"--coordinator-address {name}: JAX cannot connect the processes ({said}); {remedy}"
    )

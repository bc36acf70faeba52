"""Several processes that train one run together, each with devices of its own.

jax connects them (`jax.distributed`): process 0 runs the coordination service, with a store of short texts, barriers
and heartbeats. All processes run the same program on their own part of the arrays. Process 0 alone writes the files of
the run and prints. `agree_on` compares settings and data before the first step. `stop_reason` lets all see a signal at
the same step. If a process ends otherwise, jax ends the others after HEARTBEAT_SECONDS.

Without `joined`, this is the only process: nothing waits, and this process holds every array whole.

A process sees only its own parts of an array that lies on the devices of all. `jax.device_put` and `np.asarray` are for
arrays of one process; `placed` and `whole` are for both kinds. All processes must call `whole` in the same
order, because the devices exchange data in it.
"""

import itertools
import json
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # there is no public way to the store of texts
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.section import flag_of
from moe_jax.config import ProcessGroup
from moe_jax.system.machine import versions

HEARTBEAT_SECONDS = 10
"""A process that has sent no heartbeat for this long counts as dead."""
ANSWER_SECONDS = 45
"""How long the first meeting of all processes may take."""
_LONG = 7 * 24 * 3600.0
"""Seconds to wait for work that may take long. A dead process is noticed long before."""

_names = itertools.count()
"""Each use of a barrier needs a new name. All processes come to the barriers in the same order."""


def first() -> bool:
    """Whether this process writes and prints: process 0, or the only one."""
    return _index() == 0


def several() -> bool:
    """Whether this process trains together with others."""
    return distributed.global_state.num_processes > 1


@contextmanager
def joined(group: ProcessGroup) -> Iterator[None]:
    """Within this block, this process belongs to the group. `None` is a process alone.

    Raises UserError if the coordinator's port is in use, or jax cannot connect the processes. Ends this process with
    status 1 if the others do not answer within ANSWER_SECONDS.
    """
    if not group.several:
        yield
        return
    _connect(group)
    yield
    barrier()
    jax.distributed.shutdown()


def _connect(group: ProcessGroup) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `system.signals`
    address: dict[str, Any] = {}
    if not group.detected:
        address = {
            "coordinator_address": group.address,
            "num_processes": group.num_processes,
            "process_id": group.process_id,
            "cluster_detection_method": "deactivate",
        }
        if group.address.startswith(("127.0.0.1:", "localhost:", "[::1]:")):
            address["coordinator_bind_address"] = group.address
        if group.process_id == 0:
            _check_port(group)
    named = "cluster" if group.detected else group.address
    # jax would abort the process with a stack trace, so a line is printed before.
    timer = threading.Timer(ANSWER_SECONDS, _end, [f"--coordinator-address {named}: not all processes have answered"])
    timer.start()
    try:
        with warnings.catch_warnings():  # about a cluster whose package is missing, in many lines
            warnings.simplefilter("ignore")
            jax.distributed.initialize(
                **address,
                initialization_timeout=2 * ANSWER_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        remedy = "start it by srun or mpirun, or give --num-processes, --process-id and an address"
        remedy = remedy if group.detected else "give every process the same free address, and start all again"
        raise UserError(
            f"--coordinator-address {named}: JAX cannot connect the processes ({_text(error)}); {remedy}"
        ) from None
    finally:
        timer.cancel()


def _check_port(group: ProcessGroup) -> None:
    """Raise UserError if the coordinator cannot listen: jax would end this process with SIGSEGV."""
    host, _, port = group.address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]") if group.local else "", int(port)), family=family).close()
    except OSError as error:
        cause = f"process 0 cannot listen there ({os.strerror(error.errno or 0)}); name a free port"
        raise UserError(f"--coordinator-address {group.address}: {cause}") from None


def _end(text: str) -> None:
    print(f"error: {text} within {ANSWER_SECONDS} s; start all at about the same time", file=sys.stderr, flush=True)
    os._exit(1)


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _client() -> Any:
    return distributed.global_state.client


def _index() -> int:
    """`jax.process_index()`, which would start the devices if they were not started."""
    return distributed.global_state.process_id


def barrier(seconds: float = _LONG) -> None:
    """Wait until every process is here."""
    if several():
        _client().wait_at_barrier(f"moe_jax/{next(_names)}", int(1000 * seconds))


def exchange(text: str, seconds: float = _LONG) -> list[str]:
    """The texts that all processes give, in their order."""
    if not several():
        return [text]
    folder = f"moe_jax/exchange/{next(_names)}"
    _client().key_value_set(f"{folder}/{_index()}", text)
    barrier(seconds)
    texts = {int(name.rpartition("/")[2]): value for name, value in _client().key_value_dir_get(folder)}
    return [texts[index] for index in sorted(texts)]


def agree_on(facts: Mapping[str, Any], seconds: float = _LONG) -> None:
    """Raise ConfigError in every process unless all give the same values. A name is shown to the user."""
    if not several():
        return
    everyone = [json.loads(text) for text in exchange(json.dumps(facts), seconds)]
    for name, expected in everyone[0].items():
        for index, values in enumerate(everyone):
            if values.get(name) != expected:
                raise ConfigError(
                    f"{name}: {values.get(name)} in process {index}, and {expected} in process 0; "
                    "all processes of a run must be started alike"
                )


def check_same_program(config: RunConfig, resumed: bool) -> None:
    """Raise ConfigError in every process unless all have the same settings and the same packages.

    The folder of the run may differ: it may be mounted under another path.
    """
    if not several():
        return
    facts = {flag_of(config.section(section), name): value for section, name, value in config.settings() if name != "out"}
    facts |= {"a run in --out": resumed}
    agree_on(facts | {f"version of {name}": version for name, version in versions().items()}, ANSWER_SECONDS)


def stop_reason(signal: int | None) -> int | None:
    """The signal that came to any process. All processes call this at the same step, and all get the same answer."""
    return largest(signal or 0) or None if several() else signal


# Arrays that lie on the devices of several processes


def placed(x: Any, sharding: Sharding) -> Array:
    """An array that every process has whole, laid out on the devices of all processes."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def is_here(x: Any) -> bool:
    """Whether this process has all values of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def whole(x: Any) -> np.ndarray:
    """The values of an array, gathered from all processes if necessary.

    The values of a sharded array exist only as long as the caller keeps them. `np.asarray` would keep them as long
    as the array exists.
    """
    if not is_here(x):
        x = _replicate(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return np.asarray(x)
    values = np.empty(x.shape, x.dtype)
    for part in x.addressable_shards:
        if part.replica_id == 0:
            # A new array with the same memory, because a part keeps a copy of its values too.
            again = jax.make_array_from_single_device_arrays(part.data.shape, part.data.sharding, [part.data])
            values[part.index] = np.asarray(again)
    return values


@cache
def _replicate(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def largest(number: int) -> int:
    """The largest of the int32 numbers that the processes give. All processes must call this together."""
    devices = NamedSharding(Mesh(np.array(jax.devices()), ("device",)), PartitionSpec("device"))
    own = np.full(1, number, np.int32)
    numbers = jax.make_array_from_callback((devices.mesh.size,), devices, lambda index: own)
    return int(_maximum(devices)(numbers))


@cache
def _maximum(devices: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(devices.mesh, PartitionSpec()))

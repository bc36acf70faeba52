"""Several processes that train one run together, each with devices of its own.

jax connects them (`jax.distributed`): process 0 runs the coordination service. All processes run the same program on
their own part of the arrays. Process 0 alone writes the files of the run and prints. `agree_on` compares settings and
data before the first step. `stop_reason` lets all see a signal at the same step. If a process ends otherwise, jax ends
the others after HEARTBEAT_SECONDS.

Without `process_group`, this is the only process: nothing waits, and this process holds every array whole.

A process sees only its own parts of an array that lies on the devices of all. `jax.device_put` and `np.asarray` are for
arrays of one process; `place` and `gather_to_host` are for both kinds. All processes must call `gather_to_host` in the
same order, because the devices exchange data in it.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array

from moe_jax.config import ConfigError, ProcessGroup, UserError

HEARTBEAT_SECONDS = 10
"""A process that has sent no heartbeat for this long counts as dead."""
ANSWER_SECONDS = 45
"""How long the first meeting of all processes may take."""


def is_multi_process() -> bool:
    """Whether this process trains together with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_process_zero() -> bool:
    """Whether this process writes and prints: process 0, or the only one."""
    return not is_multi_process() or jax.process_index() == 0


@contextmanager
def process_group(group: ProcessGroup) -> Iterator[None]:
    """Within this block, this process belongs to the group, and prints on stdout only if it is process 0.

    Raises UserError if the coordinator's port is in use, or jax cannot connect the processes.
    """
    if not group.several:
        yield
        return
    _connect(group)
    with Path(os.devnull).open("w") as nowhere, nullcontext() if is_process_zero() else redirect_stdout(nowhere):
        yield
    barrier()
    jax.distributed.shutdown()


def _connect(group: ProcessGroup) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `system.signals`
    given: dict[str, Any] = {}
    if not group.detected:
        given = {"num_processes": group.num_processes, "process_id": group.process_id}
        given |= {"coordinator_address": group.address, "cluster_detection_method": "deactivate"}
        given |= {"coordinator_bind_address": group.address} if group.local else {}
        if group.process_id == 0:
            _check_port(group)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=ANSWER_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        named = "cluster" if group.detected else group.address
        remedy = "start it by srun or mpirun, or give --num-processes, --process-id and an address"
        remedy = remedy if group.detected else "give every process the same free address, and start all again"
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"--coordinator-address {named}: JAX cannot connect the processes ({cause}); {remedy}"
        ) from None


def _check_port(group: ProcessGroup) -> None:
    """Raise UserError if the coordinator cannot listen: jax would end this process with SIGSEGV."""
    host, _, port = group.address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]") if group.local else "", int(port)), family=family).close()
    except OSError as error:
        cause = f"process 0 cannot listen there ({os.strerror(error.errno or 0)}); name a free port"
        raise UserError(f"--coordinator-address {group.address}: {cause}") from None


def barrier() -> None:
    """Wait until every process is here."""
    if is_multi_process():
        multihost_utils.sync_global_devices("moe_jax")


def agree_on(facts: Mapping[str, Any]) -> None:
    """Raise ConfigError in every process unless all give the same values. All must call this together. A name is shown
    to the user."""
    if not is_multi_process():
        return
    own = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) - own.size)))
    everyone = [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]
    for name, expected in everyone[0].items():
        for index, values in enumerate(everyone):
            if values.get(name) != expected:
                raise ConfigError(
                    f"{name}: {values.get(name)} in process {index}, and {expected} in process 0; "
                    "all processes of a run must be started alike"
                )


def stop_reason(signal: int | None) -> int | None:
    """The signal that came to any process. All processes call this at the same step, and all get the same answer."""
    if not is_multi_process():
        return signal
    return int(multihost_utils.process_allgather(np.int32(signal or 0)).max()) or None


# Arrays that lie on the devices of several processes


def place(x: Any, sharding: Sharding) -> Array:
    """An array that every process has whole, laid out on the devices of all processes."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def gather_to_host(x: Any) -> np.ndarray:
    """The values of an array, gathered from all processes if necessary."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

"""Which processes train a run together, as the flags of `train.py` name them. Standard library only."""

import os
from dataclasses import dataclass
from typing import Self

from moe_jax.system.errors import ConfigError


@dataclass(frozen=True)
class ProcessGroup:
    """The place of this process in a group of processes. Process 0 is the coordinator, which the others call."""

    count: int
    index: int
    coordinator: str
    """host:port of process 0."""
    detected: bool = False
    """Whether jax asks the cluster for the other three (SLURM, Kubernetes, Open MPI, TPU)."""

    @classmethod
    def of(cls, count: int | None, index: int | None, coordinator: str, cluster: bool) -> Self | None:
        """The group that the flags name. None for a process that trains alone. Raises ConfigError.

        Without an address, that in JAX_COORDINATOR_ADDRESS is taken, as jax itself does.
        """
        if cluster:
            if count is not None or index is not None or coordinator:
                raise ConfigError(
                    "--cluster: the cluster says the number of processes, the id and the address; leave out "
                    "--num-processes, --process-id and --coordinator-address"
                )
            return cls(0, 0, "", detected=True)
        if count is None:
            for flag, given in (("--process-id", index is not None), ("--coordinator-address", bool(coordinator))):
                if given:
                    raise ConfigError(f"{flag}: needs --num-processes, the number of processes that train together")
            return None
        if not 1 <= count <= 2**16:
            raise ConfigError(f"--num-processes {count}: must be between 1 and {2**16:,}")
        if count == 1:
            return None
        if index is None or not 0 <= index < count:
            given = "--process-id: must be given," if index is None else f"--process-id {index}: must be"
            raise ConfigError(f"{given} between 0 and {count - 1} for --num-processes {count}")
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) < 2**16):
            raise ConfigError(
                f"--coordinator-address {coordinator}: must be HOST:PORT of process 0, such as 127.0.0.1:9876"
            )
        return cls(count, index, coordinator)

    @property
    def local(self) -> bool:
        """Whether all processes run on this machine."""
        return self.coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")

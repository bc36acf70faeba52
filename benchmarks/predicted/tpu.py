"""TPU slices that need not be there: their sizes and stated figures, for plans (group `tpu-plan`)."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_jax.config import UserError
from predicted.interconnect import ICI_V5E, V5E_SLICES, Torus
from predicted.roofline import BANDWIDTH_SHARE, MATMUL_SHARE, Rates

NEEDED = "planning for TPUs needs libtpu: run it with `uv run --group tpu-plan python benchmarks/plan_pods.py`"


@dataclass(frozen=True)
class Slice:
    """A slice of TPU v5e chips. Figures from Google's page "Cloud TPU v5e": 16 GB of memory at 819 GB/s and 197
    TFLOP/s in bfloat16 for each chip."""

    chips: int

    memory: ClassVar[int] = 16 * 2**30
    """Bytes of a chip."""
    usable: ClassVar[float] = 15.75 * 2**30
    """Bytes that XLA's compiler gives to a program. It refuses a larger program with this number in its message."""
    links: ClassVar[Torus] = ICI_V5E
    platform: ClassVar[str] = "tpu"
    device_kind: ClassVar[str] = "TPU v5 lite"
    rates: ClassVar[Rates] = Rates(
        BANDWIDTH_SHARE * 819e9,
        # The chip multiplies bfloat16. A float32 product takes one pass at default precision, and six at the highest.
        MATMUL_SHARE * 197e12 / 6,
        MATMUL_SHARE * 197e12,
        MATMUL_SHARE * 197e12,
        launch=0.0,
    )
    """One program runs on the chip, so its kernels have no launch."""

    @property
    def name(self) -> str:
        return f"v5e-{self.chips}"

    def devices(self) -> list[Any]:
        """Descriptions of the chips, in the order in which JAX numbers them.

        Raises UserError if libtpu is not installed.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(NEEDED)
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks Google Cloud which TPU this machine has, and waits
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a second process that plans would be refused
        from jax.experimental import topologies

        grid = V5E_SLICES[self.chips]
        rows, columns = (min(2, int(side)) for side in grid.split("x"))
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"v5e:{grid}",
            chip_config_name="default",
            chips_per_host_bounds=(rows, columns, 1),
            num_slices=1,
        )
        return list(topology.devices)

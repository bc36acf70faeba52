"""What connects the devices of a plan, and the time of a collective by its stated bandwidth. Nothing is measured.

A group of devices that reduces or gathers forms a ring, so a device sends `GroupedCollective.wire` bytes. In an
all-to-all each device sends an equal part of its array to every other one. Three kinds of links are known:

    a switch or a bus    every card has one link of its own, and all links work at once
    a network            a group over several hosts also sends through the network, which all cards of a host share
    a torus              a chip has links to its neighbours only, so an all-to-all is limited by the links that cross
                         the middle of the group (its bisection)

Latency is not counted, and no collective runs beside arithmetic. Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_jax.config import ConfigError, MeshShape

if TYPE_CHECKING:
    from predicted.collectives import GroupedCollective

LINK_SHARE = 0.8
"""Share of the stated bandwidth that a link reaches. Assumed."""

type Place = tuple[int, ...]
"""Where a device is: (host,) of a GPU, (x, y) of a TPU chip."""


@dataclass(frozen=True)
class Hosts:
    """Cards in hosts. Rates are stated bytes a second in one direction."""

    name: str
    card: float
    """What one card sends to the other cards of its host."""
    per_host: int
    """Cards of a host."""
    network_name: str
    network: float
    """What one host sends to the other hosts."""
    source: str

    def in_words(self) -> str:
        return (
            f"Links, at {LINK_SHARE:.0%} of what is stated: {self.name}, {self.card / 1e9:g} GB/s a card in one "
            f"direction; {self.network_name} between hosts of {self.per_host} cards, {self.network / 1e9:g} GB/s a "
            f"host ({self.source})."
        )

    def place(self, index: int) -> Place:
        return (index // self.per_host,)

    def seconds(self, collective: "GroupedCollective", places: Sequence[Place]) -> float:
        """Time of all executions of a collective in one step. Device i lies at `places[i]`."""
        group = collective.groups[0]
        inside = collective.wire / self.card
        hosts = {places[device] for device in group}
        if len(hosts) == 1:
            return inside / LINK_SHARE
        # Each host sends once what its cards of a group have to send to other hosts, for each group that it is part of.
        ours = sum(places[device] == places[group[0]] for device in group)
        sharing = sum(any(places[d] == places[group[0]] for d in other) for other in collective.groups)
        if collective.kind == "all-to-all":
            outside = collective.total * ours * (len(group) - ours) / len(group)
        else:
            times = 2 if collective.kind == "all-reduce" else 1
            outside = times * collective.total * (len(hosts) - 1) / len(hosts)
        return max(inside, sharing * outside / self.network) / LINK_SHARE


@dataclass(frozen=True)
class Torus:
    """Chips in a grid of two dimensions. A dimension that is `wraps` chips long is a ring, a shorter one is a line."""

    name: str
    link: float
    """What one link carries in each direction: stated bytes a second."""
    wraps: int
    source: str

    def in_words(self) -> str:
        return (
            f"Links, at {LINK_SHARE:.0%} of what is stated: {self.name}, {self.link / 1e9:g} GB/s a link in one "
            f"direction ({self.source})."
        )

    def seconds(self, collective: "GroupedCollective", places: Sequence[Place]) -> float:
        """Time of all executions of a collective in one step. Device i lies at `places[i]`."""
        group = collective.groups[0]
        if len(group) == 1:
            return 0.0
        rows = [sorted({places[device][axis] for device in group}) for axis in (0, 1)]
        box = [len(row) for row in rows]
        # Distance from a chip of the group to the next one, along each side of the grid. The chips between them belong
        # to other groups, which send over the same links.
        steps = [(row[-1] - row[0]) / (len(row) - 1) if len(row) > 1 else 1.0 for row in rows]
        lanes = [
            0.0 if size == 1 else (2 if size * step == self.wraps else 1) / step
            for size, step in zip(box, steps, strict=True)
        ]
        # Groups that lie between each other share the links of their common box.
        share = min(1.0, len(group) / math.prod(box))
        if collective.kind == "all-to-all":
            # Half of the devices send half of their bytes across the middle of the box.
            crossing = collective.total * len(group) / 4
            cuts = [math.prod(box) / size * lane for size, lane in zip(box, lanes, strict=True) if lane]
            return crossing / (min(cuts) * share * self.link * LINK_SHARE)
        return collective.wire / (sum(lanes) * share * self.link * LINK_SHARE)


GPU_COUNTS = (1, 2, 4, 8, 16)
"""Numbers of cards in a scaling table."""
GPU_LINKS: dict[str, Hosts] = {
    "rtx3060-12gb": Hosts(
        "PCIe 4.0 x16",
        31.5e9,
        4,
        "10 Gb/s Ethernet",
        1.25e9,
        "16 lanes of 16 GT/s with 128b/130b coding (PCI-SIG, PCI Express 4.0); the card has no NVLink (NVIDIA, GeForce "
        "RTX 3060). Four cards a host and the network are assumed",
    ),
    "h100-80gb": Hosts(
        "NVLink 4",
        450e9,
        8,
        "400 Gb/s InfiniBand for each card",
        8 * 50e9,
        "900 GB/s a card in both directions together (NVIDIA, H100 SXM data sheet); 8 cards and 8 adapters a host "
        "(NVIDIA, DGX H100 data sheet)",
    ),
}
"""Name of a described GPU -> its links."""

ICI_V5E = Torus(
    "ICI",
    50e9,
    16,
    "1,600 Gb/s a chip over four links (Google, Cloud TPU v5e); a dimension of 16 chips is a ring",
)


def check_gpus(name: str, mesh: str = "", note: str = "") -> None:
    """Raise ConfigError unless as many cards of this name as the mesh has places can be planned for.

    `note` stands behind the name in errors, such as " (the default)".
    """
    count = MeshShape.parse(mesh).devices
    if name not in GPU_LINKS:
        known = ", ".join(sorted(GPU_LINKS))
        raise ConfigError(
            f"--gpu {name}{note}: the links between several such cards are not known; must be one of {known}"
        )
    per_host, most = GPU_LINKS[name].per_host, GPU_COUNTS[-1]
    if count > most or not (count <= per_host or count % per_host == 0):
        raise ConfigError(
            f"--mesh {mesh}: has {count} places; a plan of {name} covers 1 to {per_host} cards, or up to {most} in "
            f"hosts of {per_host}"
        )


V5E_SLICES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
"""Chips of a v5e slice -> its grid, as Google Cloud offers it ("Cloud TPU v5e", section "Configurations")."""


def slice_chips(name: str, mesh: str = "") -> int:
    """The chips of the slice that a name such as v5e-256 means.

    Raises ConfigError for another name, and for a mesh that has another number of places.
    """
    known = {f"v5e-{chips}": chips for chips in V5E_SLICES}
    if name not in known:
        raise ConfigError(f"--tpu {name}: must be one of {', '.join(known)}")
    chips, places = known[name], MeshShape.parse(mesh).devices
    if mesh and places != chips:
        raise ConfigError(
            f"--mesh {mesh}: has {places} places, and {name} has {chips} chips; give a mesh whose product is {chips}"
        )
    return chips

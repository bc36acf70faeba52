"""The time of a collective on described links, by hand; and which devices have links that are described."""

from typing import Any

import pytest

from moe_jax.config import ConfigError
from moe_jax.parallel.collectives import Collective
from moe_jax.planning.interconnect import GPU_LINKS, ICI_V5E, Hosts, Torus, check_gpus, slice_chips

HOSTS = Hosts("bus", card=8e9, per_host=4, network_name="net", network=1e9, source="here")
TORUS = Torus("links", link=1e9, wraps=4, source="here")
"""A dimension of 4 chips is a ring here."""
GRID = [(x, y) for y in range(4) for x in range(4)]
ALL_16 = (tuple(range(16)),)


def collective(kind: Any, groups: tuple, size: int = 800_000, loops: tuple = ()) -> Collective:
    """`size` numbers of one byte on each device."""
    return Collective(kind, "", (("s8", (size,)),), groups, loops)


@pytest.mark.parametrize(
    ("kind", "groups", "microseconds"),
    [
        # Four cards of a host at 8 GB/s each, 80 % reached: a ring sends 3/4 of 800 kB, an all-reduce twice.
        ("all-to-all", ((0, 1, 2, 3),), 600e3 / 6.4e3),
        ("reduce-scatter", ((0, 1, 2, 3),), 600e3 / 6.4e3),
        ("all-reduce", ((0, 1, 2, 3),), 1200e3 / 6.4e3),
        # Two hosts of four: each of four cards sends half of its 800 kB to the other host, at 1 GB/s together.
        ("all-to-all", (tuple(range(8)),), 1600e3 / 0.8e3),
        # A host sends half of 800 kB, and in an all-reduce twice.
        ("reduce-scatter", (tuple(range(8)),), 400e3 / 0.8e3),
        ("all-reduce", (tuple(range(8)),), 800e3 / 0.8e3),
        # Four groups of two cards, one on each host: they share the network.
        ("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 4 * 800e3 / 0.8e3),
    ],
)
def test_time_of_a_collective_between_cards(kind: Any, groups: tuple, microseconds: float) -> None:
    places = [HOSTS.place(device) for device in range(8)]
    assert HOSTS.seconds(collective(kind, groups), places) == pytest.approx(1e-6 * microseconds)
    assert HOSTS.seconds(collective(kind, groups, loops=(3,)), places) == pytest.approx(3e-6 * microseconds)


@pytest.mark.parametrize(
    ("kind", "groups", "microseconds"),
    [
        # The whole 4 x 4 torus: two rings of two directions leave each chip, 4 GB/s, of which 80 % is reached.
        ("all-reduce", ALL_16, 2 * 750e3 / 3.2e3),
        ("reduce-scatter", ALL_16, 750e3 / 3.2e3),
        # A row of 4 chips is a ring: 2 GB/s.
        ("all-reduce", tuple(tuple(range(4 * y, 4 * y + 4)) for y in range(4)), 2 * 600e3 / 1.6e3),
        # Two neighbours have one link.
        ("all-reduce", tuple((2 * i, 2 * i + 1) for i in range(8)), 2 * 400e3 / 0.8e3),
        # Across the middle of 4 x 4 go 4 rings with 2 links each; 8 chips send half of 800 kB to the other side.
        ("all-to-all", ALL_16, 8 * 400e3 / (8 * 0.8e3)),
        # A row: two links across its middle, and two chips send half of their bytes.
        ("all-to-all", tuple(tuple(range(4 * y, 4 * y + 4)) for y in range(4)), 2 * 400e3 / (2 * 0.8e3)),
        # A line of two rows of two chips: 2 links cross the middle.
        ("all-to-all", ((0, 1, 4, 5), (2, 3, 6, 7)), 2 * 400e3 / (2 * 0.8e3)),
        # Every second chip of a row: hops over two links, which the other half of the row uses too. As many links go
        # round the ring, so each group has half of 2 GB/s.
        ("all-reduce", tuple((4 * y + x, 4 * y + x + 2) for y in range(4) for x in range(2)), 2 * 400e3 / 0.8e3),
        # Four blocks of 2 x 2, and the groups of equal corners: a line of 2 x 2 hops, each over two links of a ring.
        ("all-to-all", tuple((c, c + 2, c + 8, c + 10) for c in (0, 1, 4, 5)), 2 * 400e3 / (2 * 0.8e3)),
        ("all-reduce", ((0,), (1,)), 0.0),
    ],
)
def test_time_of_a_collective_on_a_torus(kind: Any, groups: tuple, microseconds: float) -> None:
    assert TORUS.seconds(collective(kind, groups), GRID) == pytest.approx(1e-6 * microseconds)


def test_groups_that_interleave_share_the_links_of_their_box() -> None:
    """Devices 0, 4, 8 and 12 are a column. Two columns that are mixed have a box of 2 x 4, and each has half of it."""
    column = TORUS.seconds(collective("all-reduce", ((0, 4, 8, 12),)), GRID)
    mixed = TORUS.seconds(collective("all-reduce", ((0, 5, 8, 13), (1, 4, 9, 12))), GRID)
    assert column == pytest.approx(2 * 600e3 / 1.6e9)
    # Two columns of four: rings of 2 GB/s and lines of 1 GB/s, 3 GB/s, of which a group has half.
    assert mixed == pytest.approx(2 * 600e3 / (0.8 * 1.5e9))
    # Four links cross the middle of the box, whichever way it is cut, and a group has half of them.
    exchange = TORUS.seconds(collective("all-to-all", ((0, 5, 8, 13), (1, 4, 9, 12))), GRID)
    assert exchange == pytest.approx(2 * 400e3 / (4 * 0.8e9 / 2))


def test_the_stated_links() -> None:
    assert GPU_LINKS["rtx3060-12gb"].card == pytest.approx(16 * 16e9 * 128 / 130 / 8, rel=1e-3)
    assert (2 * GPU_LINKS["h100-80gb"].card, GPU_LINKS["h100-80gb"].network) == (900e9, 8 * 400e9 / 8)
    assert 4 * ICI_V5E.link == 1600e9 / 8


def test_names_of_slices_and_cards() -> None:
    assert (slice_chips("v5e-256"), slice_chips("v5e-8", "data=2,expert=4")) == (256, 8)
    for mesh in ("data=3", "data=4", "expert=8", "data=2,expert=8"):
        check_gpus("rtx3060-12gb", mesh)
    with pytest.raises(ConfigError, match="has 5 places"):
        check_gpus("rtx3060-12gb", "data=5")

"""Arrays that lie on the devices of several processes. A process sees only its own parts of them.

`jax.device_put` and `np.asarray` are for arrays whose parts all lie in this process. The functions here are for both
kinds. All processes must call `whole` and `largest` in the same order, because the devices exchange data in them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array


def placed(x: Any, sharding: Sharding) -> Array:
    """An array that every process has whole, laid out on the devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def made(shape: tuple[int, ...], sharding: Sharding, rows: Callable[[Any], np.ndarray]) -> Array:
    """An array of which `rows(index)` gives a part. Every process makes the parts of its own devices only."""
    return jax.make_array_from_callback(shape, sharding, rows)


def is_here(x: Any) -> bool:
    """Whether this process has all values of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def whole(x: Any) -> np.ndarray:
    """The values of an array, gathered from all processes if necessary.

    The values of an array that is cut exist only as long as the caller keeps them. `np.asarray` would keep them as long
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
    devices = _all_devices()
    numbers = made((devices.mesh.size,), devices, lambda index: np.full(1, number, np.int32))
    return int(_maximum(devices)(numbers))


@cache
def _all_devices() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("device",)), PartitionSpec("device"))


@cache
def _maximum(devices: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(devices.mesh, PartitionSpec()))

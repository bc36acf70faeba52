"""Compiles dispatch and combine for a batch that is split over four devices; prints what the program communicates.

Run by `test_batch_axis.py` in a process of its own, since jax counts its devices once. The router's choices are
operands: `jax.lax.top_k` is one call on a CPU, which jax does not split, so `route` gathers its logits there.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.model.moe import dispatch as d
from moe_jax.model.moe.router import Routing, route

B, T, D, E, K, SLOTS = 8, 12, 6, 4, 2, 4
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
)


def layer(capacity: d.Capacity):
    """Dispatch, experts that change nothing, combine; and the gradients of x and of the gates."""

    def run(x: jax.Array, cotangent: jax.Array, routing: Routing) -> tuple[jax.Array, ...]:
        plan, gate = capacity.plan(routing), routing.gate
        y, pull = jax.vjp(
            lambda x, gate: d.combine(d.gated(d.dispatch(x, plan), d.row_gates(gate, plan)), plan), x, gate
        )
        return y, *pull(cotangent)

    return run


def report(function, operands: tuple, batch: NamedSharding) -> dict:
    """Collectives of the compiled program, sequences on a device in its results, and how far each result is from that
    of one device, relative to its largest entry."""
    split = jax.device_put(operands, batch)
    compiled = jax.jit(function).lower(*split).compile()
    results, expected = compiled(*split), jax.jit(function)(*operands)
    errors = [
        float(abs(np.asarray(a) - np.asarray(b)).max() / abs(b).max()) for a, b in zip(results, expected, strict=True)
    ]
    return {
        "collectives": sorted(set(COLLECTIVE.findall(compiled.as_text()))),
        "shards": sorted({shard.data.shape[0] for y in results for shard in y.addressable_shards}),
        "errors": errors,
    }


def main() -> None:
    devices = jax.devices()
    if len(devices) != 4:
        sys.exit(f"{len(devices)} devices instead of 4")
    batch = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, B, T, D)).astype(np.float32)
    routing = jax.device_get(route(jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32), K))
    operands = (x, cotangent, routing)
    found = {"capacity": report(layer(d.Capacity(SLOTS)), operands, batch)}
    # Two programs that must communicate, so that finding nothing above means something.
    found["a mean over the batch"] = report(lambda x, *_: (x - x.mean(0),), operands, batch)
    found["the batch in one row"] = report(
        lambda x, *_: (jnp.roll(x.reshape(-1, D), 1, axis=0).reshape(x.shape),), operands, batch
    )
    print(json.dumps({"devices": len(devices)} | found))


if __name__ == "__main__":
    main()

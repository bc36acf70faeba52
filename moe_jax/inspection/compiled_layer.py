"""The MoE layer of a run as the compiler sees it: its jaxpr, its optimised HLO, and every matrix product of the HLO.

One layer alone is compiled: its forward pass as in training, for one window of T tokens. Only shapes are needed, so no
parameters are allocated.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.model.costs import expert_flops
from moe_jax.model.moe.layer import layer_shapes
from moe_jax.runs.load import LoadedRun
from moe_jax.system.hlo import Program, read_program

LISTING = 60_000
"""Longest listing, in characters."""
_OPCODE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.MULTILINE)
_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def compiled_layer(run: LoadedRun) -> dict[str, Any]:
    """What the report shows of the compiled layer. Costs are floating-point operations of matrix products.

    `dots`: every product with its cost, largest first. `total`: their sum. `expert_flops`: the experts' part of it.
    `bound`: cost of the experts on the rows of all slots; without a capacity, on the rows of all choices. `dense`: cost
    of all experts on all tokens. `primitives` and `instructions`: how many operations of each kind jax traced, and how
    many are left after the compiler. `jaxpr` and `hlo`: the listings.
    """
    config = run.config.model
    needed = config.seq_len * config.routing.top_k if config.dropless else config.experts * config.capacity
    moe_layer, params = layer_shapes(config)
    x = jax.ShapeDtypeStruct((1, config.seq_len, config.width), jnp.dtype(run.policy.compute))
    traced = jax.jit(moe_layer).trace(params, x)
    text = traced.lower().compile().as_text() or ""
    try:
        program = read_program(text)
    except ValueError:  # the program has a loop whose length is unknown at compile time
        program = Program([], [])
    dots = sorted(program.dots, key=lambda dot: -dot.total)
    return {
        "platform": jax.devices()[0].platform.upper(),
        "dots": [
            {
                "shapes": f"{_shape(d.left)} × {_shape(d.right)} → {_shape(d.out)} {d.dtype}",
                "runs": d.runs,
                "flops": d.total,
                "source": d.op_name.partition("/")[2] or d.op_name,
            }
            for d in dots
        ],
        "total": program.flops,
        "expert_flops": program.flops_of("experts"),
        "bound": expert_flops(config, needed),
        "dense": expert_flops(config, config.experts * config.seq_len),
        "primitives": _most_common(primitives(traced.jaxpr)),
        "instructions": _most_common(op for op in _OPCODE.findall(text) if op not in _NO_WORK),
        "jaxpr": shortened(str(traced.jaxpr)),
        "hlo": shortened(without_sources(text)),
    }


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of the operations of a jaxpr, including those inside loops, conditions and calls."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        inner = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
        inner = [v for v in inner if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        for v in inner:
            yield from primitives(v)
        if not inner:
            yield eqn.primitive.name


def _most_common(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def without_sources(hlo: str) -> str:
    """HLO text without the paths of source files, which are private. The traced operation names stay."""
    hlo = re.sub(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n?", "", hlo, flags=re.MULTILINE)
    return re.sub(r', metadata=\{(?:op_type="[^"]*" )?(op_name="[^"]*")?[^}]*\}', r"  \1", hlo)


def shortened(text: str) -> str:
    if len(text) <= LISTING:
        return text
    return text[:LISTING].rpartition("\n")[0] + f"\n... and {len(text) - LISTING:,} characters more"

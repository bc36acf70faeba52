"""The MoE layer of a run as the compiler sees it: its jaxpr, its optimised HLO, and every matrix product in that.

The layer alone, forward, for one window, as a training step runs it. Only shapes are needed, so nothing is allocated.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.analysis.accounting import expert_flops
from moe_jax.analysis.compiled import Program, read_program
from moe_jax.model.moe import Mode, MoE
from moe_jax.model.precision import choose_policy
from moe_jax.training.run import Run

LISTING = 60_000
"""Most characters of a listing."""
_OPCODE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.MULTILINE)
_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def compiled_layer(run: Run) -> dict[str, Any]:
    """What the report shows: products, largest first, with operations; the experts' share (`expert_flops`);
    `bound`, what the experts need for the rows of all slots or, without a capacity, of all choices; `dense`, what all
    experts on all tokens would take; the kinds of operations that jax traced (`primitives`) and that the compiler left
    (`instructions`), counted; listings."""
    config = run.config.model
    needed = config.seq_len * config.top_k if config.dropless else config.experts * config.capacity
    compute = jnp.dtype(choose_policy(run.config.train.precision).compute)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(config, 1.0, nnx.Rngs(params=jax.random.key(0)))))
    x = jax.ShapeDtypeStruct((1, config.seq_len, config.width), compute)

    def moe_layer(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x, Mode.TRAIN)[0]

    traced = jax.jit(moe_layer).trace(state, x)
    text = traced.lower().compile().as_text() or ""
    try:
        program = read_program(text)
    except ValueError:  # a loop whose length the compiler does not know
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
    """Names of the operations of a jaxpr, those inside of loops, conditions and calls included."""
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
    """HLO text without where its source files lie, which is nobody's business; the traced names stay."""
    hlo = re.sub(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n?", "", hlo, flags=re.MULTILINE)
    return re.sub(r', metadata=\{(?:op_type="[^"]*" )?(op_name="[^"]*")?[^}]*\}', r"  \1", hlo)


def shortened(text: str) -> str:
    if len(text) <= LISTING:
        return text
    return text[:LISTING].rpartition("\n")[0] + f"\n... and {len(text) - LISTING:,} characters more"

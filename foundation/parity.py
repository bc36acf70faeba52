"""The check: a gradient by hand | by `jax.grad` | by finite differences. The one module here that
calls autodiff; the notebooks compare with it, too.

A backward pass is a function of a cotangent, so it is tested with a random one, d_out: the scalar

    f(inputs) = <d_out, forward(inputs)>        has the gradient        backward(d_out, cache)

Autodiff shares the forward pass with the hand-written one, so it judges the backward pass alone, to rounding.
Finite differences know nothing of either. They are central and of fourth order,

    f'(x) = (8 (f(x + h) - f(x - h)) - (f(x + 2h) - f(x - 2h))) / 12h + O(h^4),    h = 1e-4

Chapter 0 weighs their two errors. Rounding is about 1e-16 |f| / h, and it counts relative to the gradient's largest
entry. The worst check of the table is at 3.4e-8, and 1e-6 is allowed. One h serves every operation.

Errors are relative to the largest entry, not elementwise: an entry that is 0 in exact arithmetic (the gradient of a
key bias, where keys are not rotated) is rounding noise in all three.

Source: the order and the balance of the two errors: Nocedal and Wright 2006, section 8.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

AUTODIFF_TOLERANCE = 1e-10
FINITE_DIFFERENCE_TOLERANCE = 1e-6
ORACLE_TOLERANCE = 1e-10

COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each check is compiled, run once, and thrown away. So most of its time is compiling, and fast code is no gain."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one program, for one run."""
    return jax.jit(function, compiler_options=COMPILER_OPTIONS)


STEP = 1e-4
"""h of the finite differences."""

MARGIN = 1e-2
"""What an input must keep from the nearest kink or change of choice, so that no step of 2h crosses it."""

FLOOR = 1e-5
"""A leaf whose largest entry is below this share of the check's largest is judged against that share."""


class _Named:
    """What both kinds of checks have."""

    operation: str
    case: str
    inputs: tuple

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", as_jax(self.inputs))

    @property
    def name(self) -> str:
        """operation: case."""
        return f"{self.operation}: {self.case}"


@dataclass(frozen=True)
class Check(_Named):
    """One hand-derived gradient at one input."""

    operation: str
    case: str
    forward: Callable[..., tuple[Any, Any]]
    """(*inputs) -> (out, cache); `out` is an array or a tree of arrays."""
    backward: Callable[[Any, Any], Any]
    """(d_out, cache) -> the gradients: a tuple like `inputs`, or the one gradient where there is one
    input."""
    inputs: tuple
    """What is differentiated: trees of float64 arrays, NumPy's or jax's. None stands for an absent one."""
    margin: float | Callable[[Any], jax.Array] = float("inf")
    """Distance from the nearest kink, or from another top-K choice: a number, or a function of the cache."""
    at_tie: bool = False
    """The input sits on a tie on purpose: the function has no derivative there, only autodiff's convention to
    agree with, so finite differences are left out."""


@dataclass(frozen=True)
class OracleCheck(_Named):
    """A function without a gradient to derive, at one input, beside an answer that is found in another way."""

    operation: str
    case: str
    function: Callable[..., Any]
    """(*inputs, *constants) -> an array or a tree of arrays."""
    oracle: Callable[..., Any]
    """The same arguments: enumeration, a closed form, a decomposition, or the whole computed at once."""
    inputs: tuple
    constants: tuple = ()
    """Arguments after the inputs that are no arrays: a number of steps, the name of a rule."""


type AnyCheck = Check | OracleCheck


class Outcome(NamedTuple):
    """Relative errors of a check; None where a comparison was left out."""

    name: str
    autodiff: float | None
    finite_difference: float | None
    oracle: float | None = None
    zeros: bool = False
    """Every right number is 0, as in a batch without targets. Then a wrong factor would pass; a NaN would not, nor a
    number where none belongs."""

    @property
    def passed(self) -> bool:
        """Every error within tolerance, and at least one comparison. Written so that NaN fails."""
        allowed = (AUTODIFF_TOLERANCE, FINITE_DIFFERENCE_TOLERANCE, ORACLE_TOLERANCE)
        made = [(error, most) for error, most in zip(self[1:4], allowed, strict=True) if error is not None]
        return len(made) > 0 and all(error <= most for error, most in made)


def run(check: AnyCheck, seed: int = 0) -> Outcome:
    """Computes the gradient three ways and compares; or the answer twice, where the check has an oracle.

    Raises ValueError where the inputs of a gradient are not float64 or are too near a kink for the step: then the
    comparison would mean nothing.
    """
    ours, right, differences = answers(check, seed)
    error, zeros = max_relative_error(ours, right), not any(np.any(leaf) for leaf in jax.tree.leaves(right))
    if isinstance(check, OracleCheck):
        return Outcome(check.name, None, None, error, zeros)
    finite = None if differences is None else max_relative_error(ours, differences)
    return Outcome(check.name, error, finite, zeros=zeros)


def answers(check: AnyCheck, seed: int = 0, differences: bool = True) -> tuple[Any, Any, Any]:
    """A gradient by hand, by autodiff, and by differences, each a tuple like the inputs; None where it is left out. Of
    a check with an oracle: the function's answer, the oracle's, and None, as trees of NumPy's float64 arrays."""
    if isinstance(check, OracleCheck):
        function = compiled(lambda inputs: check.function(*inputs, *check.constants))
        both = function(check.inputs), check.oracle(*check.inputs, *check.constants)
        ours, right = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), answer) for answer in both)
        return ours, right, None
    if any(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(check.inputs)):
        raise ValueError(f"{check.name}: inputs must be float64; set jax_enable_x64 before making them")
    differences = differences and not check.at_tie

    @compiled
    def three_ways(inputs: tuple) -> tuple[Any, Any, Any, Any]:
        # One forward pass serves both gradients. A second one, in the loop of the differences, is compiled too.
        out, pull_back, cache = jax.vjp(check.forward, *inputs, has_aux=True)
        d_out = random_like(seed, out)
        by_hand = check.backward(d_out, cache)
        if not isinstance(by_hand, tuple):
            by_hand = (by_hand,)

        def scalar(*inputs: Any) -> jax.Array:
            return inner_product(d_out, check.forward(*inputs)[0])

        margin = check.margin(cache) if callable(check.margin) else check.margin
        return by_hand, pull_back(d_out), finite_differences(scalar, inputs) if differences else None, margin

    *found, margin = three_ways(check.inputs)
    if differences and not margin > MARGIN:
        raise ValueError(f"{check.name}: margin {margin:.2g} is within {MARGIN:g} of a kink; choose another seed")
    return found[0], found[1], found[2]


def finite_differences(f: Callable[..., jax.Array], inputs: tuple) -> tuple:
    """The gradient of a scalar f, entry by entry, by the four-point central difference."""
    flat, unravel = ravel_pytree(inputs)
    shifts = np.multiply.outer([STEP, -STEP, 2.0 * STEP, -2.0 * STEP], np.eye(flat.size))
    # A loop over the points: f for all points at once runs no faster here, and takes twice as long to compile.
    values = lax.map(lambda shift: f(*unravel(flat + shift)), shifts.reshape(-1, flat.size))
    weights = np.array([8.0, -8.0, -1.0, 1.0]) / (12.0 * STEP)
    return unravel(weights @ values.reshape(4, flat.size))


def max_relative_error(ours: Any, reference: Any) -> float:
    """The largest over leaves of max|a - b| / max(max|a|, max|b|, 1e-5 x the largest entry of all leaves).

    0 where everything is exactly 0 in both; NaN where anything is NaN. Raises ValueError where the trees or
    the shapes differ: a gradient must look like its parameter.
    """
    a_leaves, a_tree = jax.tree.flatten(jax.tree.map(np.asarray, ours))  # in NumPy, which compiles nothing
    b_leaves, b_tree = jax.tree.flatten(jax.tree.map(np.asarray, reference))
    if a_tree != b_tree or any(a.shape != b.shape for a, b in zip(a_leaves, b_leaves, strict=True)):
        raise ValueError(f"gradients {jax.tree.map(jnp.shape, ours)} against {jax.tree.map(jnp.shape, reference)}")
    largest = max(_largest(leaf) for leaf in a_leaves + b_leaves)
    errors = [
        _largest(a - b) / max(_largest(a), _largest(b), FLOOR * largest) if largest != 0.0 else 0.0
        for a, b in zip(a_leaves, b_leaves, strict=True)
    ]
    return float(np.max(errors, initial=0.0))  # Python's max would pass over a NaN


def _largest(leaf: np.ndarray | np.generic) -> float:
    return float(np.max(np.abs(leaf))) if leaf.size else 0.0


def as_jax(tree: Any) -> Any:
    """The tree with jax arrays for NumPy's. What else is in it stays."""
    # `jnp.asarray` would be compiled for each shape.
    return jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def random_like(seed: int, tree: Any) -> Any:
    """A tree of standard normal arrays of the same shapes and types."""
    draws = np.random.default_rng(seed)  # jax.random would be compiled for each shape
    return jax.tree.map(lambda leaf: jnp.asarray(draws.standard_normal(leaf.shape), leaf.dtype), tree)


def inner_product(a: Any, b: Any) -> jax.Array:
    """<a, b>, summed over all leaves of two like trees."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def autodiff_value_and_gradient(f: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Any]]:
    """`jax.value_and_grad` of f in its first argument: what the lessons compare themselves with."""
    return jax.value_and_grad(f)

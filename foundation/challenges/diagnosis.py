"""What a wrong gradient looks like, and what such a look usually means."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-10
"""Relative to the largest entry, as in the table."""


@dataclass(frozen=True)
class Named:
    """An array that a learner knows by a name."""

    name: str
    array: np.ndarray


@dataclass(frozen=True)
class Finding:
    """What is wrong with one result: the measurement, and what it usually means. `wrong` is empty where it is right."""

    wrong: str = ""
    meaning: str = ""


def examine(name: str, answer: Any, right: Any, known: Sequence[Named], others: Sequence[Named] = ()) -> Finding:
    """Compares one result with the right one.

    `known` are the inputs and the cache, which may explain a factor or a missing term; `others` are the right results
    of the other inputs, for two that changed places.
    """
    if right is None:
        missing = "there is no such input in this case: return None for it"
        return Finding() if answer is None else Finding(f"{name} is {kind_of(answer)}", missing)
    right = np.asarray(right)
    if answer is None:
        return Finding(f"{name} is None", f"an array of shape {_shape(right)} is asked for")
    try:
        ours = np.asarray(answer)
    except Exception:
        return Finding(f"{name} is {kind_of(answer)}", f"an array of shape {_shape(right)} is asked for")
    if ours.dtype.kind not in "fiub":
        return Finding(f"{name} is {kind_of(answer)}", f"an array of numbers of shape {_shape(right)} is asked for")
    if ours.shape != right.shape:
        return Finding(f"{name} has shape {_shape(ours)}, and its input has {_shape(right)}", _of_shape(ours, right))
    narrow = ours.dtype.kind == "f" and ours.dtype.itemsize < 8
    ours = ours.astype(np.float64)
    scale = max(np.max(np.abs(right), initial=0.0), 1e-300)
    off = ~(np.abs(ours - right) <= TOLERANCE * scale)
    if not off.any():
        return Finding()
    if narrow and np.max(np.abs(ours - right)) < 1e-5 * scale:
        return Finding(f"{name} is right to the precision of float32", "keep the type of the input, which is float64")
    return Finding(_first_wrong(name, ours, right, off), _meaning(ours, right, off, known, others))


def kind_of(answer: Any) -> str:
    """What an answer is, in words."""
    if hasattr(answer, "shape") and hasattr(answer, "dtype"):
        return "an array"
    return f"of type {type(answer).__name__}"


def _shape(array: np.ndarray) -> str:
    return str(list(array.shape))


def _of_shape(ours: np.ndarray, right: np.ndarray) -> str:
    if ours.ndim >= 2 and ours.shape[::-1] == right.shape:
        return "transposed: a gradient has the shape of what it is the gradient of"
    if ours.size == right.size:
        return "the right number of entries in another shape: reshape, or swap axes"
    if ours.ndim > right.ndim:
        return "an axis too many: an input that is used for several rows collects the sum over them"
    return "a gradient has the shape of what it is the gradient of"


def _first_wrong(name: str, ours: np.ndarray, right: np.ndarray, off: np.ndarray) -> str:
    index = tuple(int(i) for i in np.argwhere(off)[0])
    place = f"{name}[{', '.join(map(str, index))}]" if index else name
    yours, wanted = float(ours[index]), float(right[index])
    ratio = f", ratio {yours / wanted:.6g}" if wanted != 0.0 and math.isfinite(yours) else ""
    return f"{place}: yours {yours:.8g}, right {wanted:.8g}{ratio} ({int(off.sum())} of {off.size} entries are off)"


def _meaning(
    ours: np.ndarray, right: np.ndarray, off: np.ndarray, known: Sequence[Named], others: Sequence[Named]
) -> str:
    if not np.isfinite(ours).all():
        return "not a finite number: look for 0 / 0, or for a logarithm or a power of something that can be 0"
    for rule in (_simple, _factor, _swapped, _term, _partly):
        found = next(rule(ours, right, off, known, others), "")
        if found:
            return found
    return "no simple pattern: write one entry of the output as a sum, and differentiate that"


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.max(np.abs(a - b), initial=0.0) <= 1e-8 * np.max(np.abs(b), initial=1e-300))


def _simple(ours: np.ndarray, right: np.ndarray, off: np.ndarray, known: Sequence[Named], _: Any) -> Iterator[str]:
    """One factor for all entries."""
    if not ours.any():
        yield "zero everywhere: this way back is missing"
    if not right.any():
        yield "this gradient is exactly 0 here: something that changes nothing gets a gradient"
    if ours.ndim == 2 and ours.shape[0] == ours.shape[1] and _close(ours.T, right):
        yield "transposed: the right numbers, rows and columns exchanged"
    ratio = float(np.vdot(ours, right) / max(np.vdot(right, right), 1e-300))
    if ratio and _close(ours, ratio * right):
        yield f"a ratio of {ratio:.6g} in every entry: {'; or '.join(_ratios(ratio, known)[:3])}"


def _ratios(ratio: float, known: Sequence[Named]) -> list[str]:
    """What a constant ratio usually means."""
    said = []
    if math.isclose(ratio, -1.0, rel_tol=1e-6):
        said.append("a sign is wrong")
    for value, text in ((2.0, "a forgotten 1/2, or one way counted twice"), (0.5, "a forgotten factor 2")):
        if math.isclose(abs(ratio), value, rel_tol=1e-6):
            said.append(text)
    counts: dict[int, str] = {}
    for one in known:
        shape = one.array.shape
        for axis, size in enumerate(shape):
            counts.setdefault(size, f"{size}, axis {axis} of {one.name}")
        if len(shape) > 1:
            counts.setdefault(math.prod(shape[:-1]), f"{math.prod(shape[:-1])}, the rows of {one.name}")
    for size, where in counts.items():
        if size < 2:
            continue
        for value, text in (
            (1.0 / size, "a mean where a sum belongs, divided by"),
            (float(size), "a sum where a mean belongs, not divided by"),
            (math.sqrt(size), "a forgotten 1/sqrt of"),
            (1.0 / math.sqrt(size), "one 1/sqrt too many of"),
        ):
            if math.isclose(abs(ratio), value, rel_tol=1e-6):
                said.append(f"{text} {where}")
    return said or ["a constant factor is wrong"]


def _factor(ours: np.ndarray, right: np.ndarray, off: np.ndarray, known: Sequence[Named], _: Any) -> Iterator[str]:
    """A factor that is a known array."""
    for one in known:
        try:
            if not one.array.size or np.broadcast_shapes(one.array.shape, ours.shape) != ours.shape:
                continue
        except ValueError:
            continue
        if _close(ours * one.array, right):
            yield f"a factor is missing: multiply by {one.name}"
        if _close(ours, right * one.array):
            yield f"a factor too many: {one.name} is multiplied in once too often"
        if _close(ours, right * one.array**2):
            yield f"divided where it should be multiplied, or the other way round: {one.name}"


def _swapped(ours: np.ndarray, right: np.ndarray, off: Any, known: Any, others: Sequence[Named]) -> Iterator[str]:
    for other in others:
        if _close(ours, other.array):
            yield f"this is {other.name}: the results are in another order than the inputs"


def _term(ours: np.ndarray, right: np.ndarray, off: np.ndarray, known: Sequence[Named], _: Any) -> Iterator[str]:
    """What is missing has a simple form along each row."""
    missing = right - ours
    if ours.ndim and ours.shape[-1] > 1:
        if _close(missing, np.broadcast_to(missing[..., :1], missing.shape)):
            yield "a term is missing that is the same along each row: a mean, or a sum, over the last axis"
        for one in known:
            if one.array.shape != ours.shape:
                continue
            along = np.sum(missing * one.array, -1, keepdims=True)
            square = np.maximum(np.sum(one.array**2, -1, keepdims=True), 1e-300)
            if _close(missing, along / square * one.array):
                yield f"a term is missing: in each row it is {one.name} times one number of that row"


def _partly(ours: np.ndarray, right: np.ndarray, off: np.ndarray, _known: Any, _others: Any) -> Iterator[str]:
    if (ours[off] == 0.0).all():
        yield "the wrong entries are 0: a contribution is lost, as when the last of several overwrites the others"
    if (right[off] == 0.0).all():
        yield "the wrong entries should be exactly 0: a gradient leaks to where nothing was used"
    share = 1.0 - off.mean()
    if share >= 0.25:
        yield f"{100 * share:.0f} % of the entries are right: one of several contributions is missing or wrong"

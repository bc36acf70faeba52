"""What is wrong with an answer, and what that usually means: the one judge of `check` and of the exercises.

An answer is compared with the right one, then with what known mistakes give (`mistakes.py`), then with patterns: one
factor for all entries, a known array as a factor, a term that has a simple form along each row.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
import numpy as np

from foundation.challenges.catalogue import Unusable
from foundation.challenges.mistakes import SUMMAND

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


def judge(
    names: Sequence[str],
    answer: Any,
    right: tuple,
    known: Sequence[Named],
    mistakes: Callable[[], Iterable[tuple[str, Any]]] = tuple,
    tolerance: float = TOLERANCE,
) -> Finding:
    """The first wrong one of several results, or a finding without a fault.

    `known` are arrays that may explain a factor or a missing term. `mistakes` gives (meaning, results) of known
    mistakes; it is called only where something is wrong. Raises Unusable where the results cannot be compared.
    """
    wanted = dict(_parts(names, right))
    for name, ours in _parts(names, _as_tuple(answer, len(names)), like=right):
        others = [Named(key, np.asarray(value)) for key, value in wanted.items() if key != name and value is not None]
        finding = examine(name, ours, wanted[name], known, others, tolerance=tolerance)
        if finding.wrong:
            made = [(meaning, _as_tuple(result, len(names))) for meaning, result in mistakes()]
            made = [(meaning, dict(_parts(names, result))) for meaning, result in made if len(result) == len(names)]
            # Some mistakes give no array: a part of the cache, which is a tuple, in the place of a product.
            alike = [(meaning, result[name]) for meaning, result in made if hasattr(result.get(name), "shape")]
            return examine(name, ours, wanted[name], known, others, alike, tolerance)
    return Finding()


def _as_tuple(answer: Any, results: int) -> tuple:
    several = isinstance(answer, tuple) or (isinstance(answer, list) and results > 1)
    return tuple(answer) if several else (answer,)


def _parts(names: Sequence[str], results: tuple, like: tuple | None = None) -> Iterator[tuple[str, Any]]:
    """Each array of the results with its name; those of a dict by their keys. Raises Unusable where the results are not
    `like` these."""
    if len(results) != len(names):
        raise Unusable(f"{len(results)} results, and {len(names)} are asked for: {', '.join(names)}")
    for name, ours, wanted in zip(names, results, like or results, strict=True):
        if not isinstance(wanted, dict):
            yield name, ours
        elif isinstance(ours, dict) and ours.keys() == wanted.keys():
            yield from ((f"{name}[{key!r}]", ours[key]) for key in wanted)
        else:
            given = f"a dict of {', '.join(map(str, ours))}" if isinstance(ours, dict) else kind_of(ours)
            raise Unusable(f"{name} is {given}, and a dict of {', '.join(wanted)} is asked for")


def examine(
    name: str,
    answer: Any,
    right: Any,
    known: Sequence[Named] = (),
    others: Sequence[Named] = (),
    mistakes: Sequence[tuple[str, Any]] = (),
    tolerance: float = TOLERANCE,
) -> Finding:
    """Compares one result with the right one. `others` are the right results of the other inputs, for two that changed
    places; `mistakes` is what this result would be by known mistakes."""
    if right is None:
        missing = "there is no such input in this case: return None for it"
        return Finding() if answer is None else Finding(f"{name} is {kind_of(answer)}", missing)
    right = np.asarray(right, np.float64)
    asked_for = f"an array of numbers of shape {_shape(right)} is asked for" if right.ndim else "a number is asked for"
    if answer is None:
        return Finding(f"{name} is None", asked_for)
    try:
        ours = np.asarray(answer)
    except Exception:
        return Finding(f"{name} is {kind_of(answer)}", asked_for)
    if ours.dtype.kind not in "fiub":
        return Finding(f"{name} is {kind_of(answer)}", asked_for)
    if ours.shape != right.shape:
        meaning = next((text for text, wrong in mistakes if _close(ours, wrong)), _of_shape(ours, right))
        return Finding(f"{name} has shape {_shape(ours)}, and {_shape(right)} is asked for", meaning)
    narrow = ours.dtype.kind == "f" and ours.dtype.itemsize < 8
    ours = ours.astype(np.float64)
    scale = max(np.max(np.abs(right), initial=0.0), 1e-300)
    off = np.asarray(~(np.abs(ours - right) <= tolerance * scale))
    if not off.any():
        return Finding()
    if narrow and np.max(np.abs(ours - right)) < 1e-5 * scale:
        return Finding(f"{name} is right to the precision of float32", "keep the type of the input, which is float64")
    differs = [
        (text, np.asarray(wrong, np.float64))
        for text, wrong in mistakes
        if np.shape(wrong) == right.shape and np.isfinite(wrong).all() and not _close(wrong, right)
    ]
    return Finding(_first_wrong(name, ours, right, off), _meaning(ours, right, off, known, others, differs))


def kind_of(answer: Any) -> str:
    """What an answer is, in words."""
    if isinstance(answer, np.ndarray | jax.Array):
        return f"an array of {answer.dtype} with shape {_shape(answer)}"
    return f"of type {type(answer).__name__}"


def _shape(array: np.ndarray | jax.Array) -> str:
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
    ours: np.ndarray,
    right: np.ndarray,
    off: np.ndarray,
    known: Sequence[Named],
    others: Sequence[Named],
    mistakes: Sequence[tuple[str, np.ndarray]],
) -> str:
    if not np.isfinite(ours).all():
        return "not a finite number: look for 0 / 0, or for a logarithm or a power of something that can be 0"
    for found in (
        _plain(ours, right),
        (text for text, wrong in mistakes if _close(ours, wrong)),
        _ratio(ours, right, known),
        _factor(ours, right, known),
        (f"this is {other.name}: the results are in another order than the inputs" for other in others
         if _close(ours, other.array)),
        _summands(ours, right, mistakes),
        _two_mistakes(ours, right, known, mistakes),
        _term(ours, right, known),
        _partly(ours, right, off),
    ):  # fmt: skip
        if text := next(iter(found), ""):
            return text
    return "no simple pattern: write one entry of the output as a sum, and differentiate that"


def _close(a: Any, b: Any, tolerance: float = 1e-8) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and bool(
        np.max(np.abs(a - b), initial=0.0) <= tolerance * np.max(np.abs(b), initial=1e-300)
    )


def _plain(ours: np.ndarray, right: np.ndarray) -> Iterator[str]:
    if not ours.any():
        yield "zero everywhere: this way back is missing"
    if not right.any():
        yield "this gradient is exactly 0 here: something that changes nothing gets a gradient"
    if ours.ndim == 2 and ours.shape[0] == ours.shape[1] and _close(ours.T, right):
        yield "transposed: the right numbers, rows and columns exchanged"


def _proportion(ours: np.ndarray, wrong: np.ndarray) -> float:
    """The one factor that makes one array of another; 0 where there is none."""
    ratio = float(np.vdot(ours, wrong) / max(np.vdot(wrong, wrong), 1e-300))
    return ratio if ratio and ours.size > 1 and _close(ours, ratio * wrong) else 0.0


def _ratio(ours: np.ndarray, right: np.ndarray, known: Sequence[Named]) -> Iterator[str]:
    """One factor for all entries."""
    one_number = ours.size == 1 and right.any()
    ratio = float((ours / right).item()) if one_number else _proportion(ours, right)
    said = _ratios(ratio, known)[:3] if ratio else []
    if said or (ratio and not one_number):  # of one number any ratio is a constant one
        yield f"a ratio of {ratio:.6g} in every entry: {'; or '.join(said) or 'a constant factor is wrong'}"


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
    return said


def _factor(ours: np.ndarray, right: np.ndarray, known: Sequence[Named]) -> Iterator[str]:
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


def _two_mistakes(
    ours: np.ndarray, right: np.ndarray, known: Sequence[Named], mistakes: Sequence[tuple[str, np.ndarray]]
) -> Iterator[str]:
    """A known mistake, and a factor besides."""
    for text, wrong in mistakes:
        if wrong.any() and (ratio := _proportion(ours, wrong)):
            yield f"{text}; and a factor of {ratio:.6g} besides"
    for text, wrong in mistakes:
        if also := next(_factor(ours, wrong, known), ""):
            yield f"{text}; and {also}"


def _summands(ours: np.ndarray, right: np.ndarray, mistakes: Sequence[tuple[str, np.ndarray]]) -> Iterator[str]:
    """The right summands, one or two of them with wrong factors."""
    summands = [(text.partition(SUMMAND)[2], (right - wrong).ravel()) for text, wrong in mistakes if SUMMAND in text]
    off = (ours - right).ravel()
    for chosen in (*combinations(summands, 1), *combinations(summands, 2)):
        if off.size < 2 + len(chosen):
            continue
        columns = np.stack([summand for _, summand in chosen], axis=1)
        factors = np.linalg.lstsq(columns, off, rcond=None)[0]
        if _close(columns @ factors, off, 1e-7):
            yield "; and ".join(
                f"{SUMMAND}{text}"
                if abs(f + 1.0) < 1e-6
                else f"a summand is {1.0 + f:.4g} times what it should be: {text}"
                for (text, _), f in zip(chosen, factors, strict=True)
            )


def _term(ours: np.ndarray, right: np.ndarray, known: Sequence[Named]) -> Iterator[str]:
    """What is missing has a simple form along each row."""
    missing = right - ours
    if ours.ndim and ours.shape[-1] > 1:
        if _close(missing, np.broadcast_to(missing[..., :1], missing.shape)):
            yield "a term is missing or too many, the same along each row: a mean, or a sum, over the last axis"
        for one in known:
            if one.array.shape != ours.shape:
                continue
            along = np.sum(missing * one.array, -1, keepdims=True)
            square = np.maximum(np.sum(one.array**2, -1, keepdims=True), 1e-300)
            if _close(missing, along / square * one.array):
                yield f"a term is missing: in each row it is {one.name} times one number of that row"


def _partly(ours: np.ndarray, right: np.ndarray, off: np.ndarray) -> Iterator[str]:
    if (ours[off] == 0.0).all():
        yield "the wrong entries are 0: a contribution is lost, as when the last of several overwrites the others"
    if (right[off] == 0.0).all():
        yield "the wrong entries should be exactly 0: a gradient leaks to where nothing was used"
    share = 1.0 - off.mean()
    if share >= 0.25:
        yield f"{100 * share:.0f} % of the entries are right: what sets the others apart?"

"""Reverse-mode differentiation of scalars: the whole idea, before any array appears.

A `Value` remembers the values that it was computed from and, for each, the local derivative: a number,
known the moment that the operation runs. `backward` visits the graph from the end and adds, for every edge,

    parent.grad += local derivative * child.grad        (the chain rule)

"adds", because a value that is used twice influences the result in two ways, and the influences sum. And a
value may hand its gradient on only after it has received all of it, so the order is a topological one.

`draw` shows the graph with the numbers of both passes.

Sources: Linnainmaa 1970; Baydin et al. 2018, section 3.2 and table 3 (a trace of reverse mode).
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Value:
    """One number in a computation, with how it came about. Operators build the graph; `backward` fills
    `grad`."""

    def __init__(
        self, data: float, name: str = "", operation: str = "", edges: tuple[tuple["Value", float], ...] = ()
    ) -> None:
        self.data = float(data)
        self.name = name
        self.operation = operation
        self.edges = edges
        """(parent, d self / d parent) for each operand."""
        self.grad = 0.0
        """d result / d self, once `backward` has been called on the result."""

    def __repr__(self) -> str:
        return f"Value({self.data:.4g}, grad={self.grad:.4g})"

    def __add__(self, other: "Value | float | int") -> "Value":
        other = _lift(other)
        return Value(self.data + other.data, operation="+", edges=((self, 1.0), (other, 1.0)))

    def __mul__(self, other: "Value | float | int") -> "Value":
        other = _lift(other)
        return Value(self.data * other.data, operation="×", edges=((self, other.data), (other, self.data)))

    def __pow__(self, exponent: float | int) -> "Value":
        slope = exponent * self.data ** (exponent - 1)
        return Value(self.data**exponent, operation=f"^{exponent:g}", edges=((self, slope),))

    def __neg__(self) -> "Value":
        return self * -1.0

    def __sub__(self, other: "Value | float | int") -> "Value":
        return self + -_lift(other)

    def __truediv__(self, other: "Value | float | int") -> "Value":
        return self * _lift(other) ** -1.0

    def __radd__(self, other: float | int) -> "Value":
        return self + other

    def __rmul__(self, other: float | int) -> "Value":
        return self * other

    def __rsub__(self, other: float | int) -> "Value":
        return _lift(other) - self

    def __rtruediv__(self, other: float | int) -> "Value":
        return _lift(other) / self

    def exp(self) -> "Value":
        """e^x, whose derivative is itself."""
        y = math.exp(self.data)
        return Value(y, operation="exp", edges=((self, y),))

    def log(self) -> "Value":
        """ln x, with derivative 1/x."""
        return Value(math.log(self.data), operation="log", edges=((self, 1.0 / self.data),))

    def tanh(self) -> "Value":
        """tanh x, with derivative 1 - tanh^2 x."""
        y = math.tanh(self.data)
        return Value(y, operation="tanh", edges=((self, 1.0 - y**2),))

    def relu(self) -> "Value":
        """max(x, 0), with derivative 1 where x > 0, else 0."""
        return Value(max(self.data, 0.0), operation="relu", edges=((self, float(self.data > 0)),))

    def backward(self) -> None:
        """Sets `grad` of every value that this one depends on to d self / d value. May be called again: it
        starts from zero each time."""
        order = topological_order(self)
        for value in order:
            value.grad = 0.0
        self.grad = 1.0
        for value in reversed(order):
            for parent, local in value.edges:
                parent.grad += local * value.grad


def _lift(number: "Value | float | int") -> Value:
    return number if isinstance(number, Value) else Value(number)


def topological_order(result: Value) -> list[Value]:
    """All values that `result` depends on, each after its operands, `result` last. A loop, not a recursion,
    so that a long sum does not reach Python's limit."""
    order: list[Value] = []
    seen: set[int] = set()
    stack = [(result, False)]
    while stack:
        value, operands_done = stack.pop()
        if operands_done:
            order.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack.append((value, True))
            stack.extend((parent, False) for parent, _ in value.edges)
    return order


def layout(result: Value) -> dict[int, tuple[float, float]]:
    """A place (column, row) for each value, by id: its column is its longest distance from an input, and
    each column is ordered by the mean row of the operands, so that few edges cross."""
    columns: dict[int, int] = {}
    by_column: dict[int, list[Value]] = {}
    for value in topological_order(result):
        columns[id(value)] = 1 + max((columns[id(parent)] for parent, _ in value.edges), default=-1)
        by_column.setdefault(columns[id(value)], []).append(value)
    places: dict[int, tuple[float, float]] = {}
    for column in sorted(by_column):
        values = by_column[column]
        if column > 0:
            values.sort(key=lambda v: sum(places[id(p)][1] for p, _ in v.edges) / len(v.edges))
        for row, value in enumerate(values):
            places[id(value)] = (float(column), row - (len(values) - 1) / 2)
    return places


def draw(result: Value, axes: "Axes") -> None:
    """Draws the graph that ends in `result`: each box holds name or operation, value and gradient; each
    edge its local derivative."""
    places = layout(result)
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
    axes.set_ylim(min(ys) - 0.9, max(ys) + 0.7)
    axes.axis("off")
    for value in topological_order(result):
        for parent, local in value.edges:
            _draw_edge(axes, places[id(parent)], places[id(value)], f"{local:.3g}")
    for value in topological_order(result):
        label = value.name or value.operation or f"{value.data:g}"
        box = {
            "boxstyle": "round,pad=0.45",
            "facecolor": "#fff4e0" if value.edges else "#e8f0fe",
            "edgecolor": "#51607a",
        }
        text = f"{label}\nvalue {value.data:.3g}\ngrad {value.grad:.3g}"
        x, y = places[id(value)]
        axes.text(x, y, text, fontsize=8.5, ha="center", va="center", bbox=box)


def _draw_edge(axes: "Axes", start: tuple[float, float], end: tuple[float, float], label: str) -> None:
    """An arrow with a label at its middle; one that passes columns bends away from the boxes there."""
    passes = end[0] - start[0] > 1.0
    bend = (0.35 if start[1] <= end[1] else -0.35) if passes else 0.0
    arrow = {"arrowstyle": "-|>", "color": "#7a869a", "lw": 1.3, "shrinkA": 30, "shrinkB": 36}
    arrow["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    # matplotlib bends on the screen, so the middle of the arc is found there.
    (x0, y0), (x1, y1) = axes.transData.transform([start, end])
    middle = ((x0 + x1 + bend * (y1 - y0)) / 2, (y0 + y1 - bend * (x1 - x0)) / 2)
    style = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    x, y = axes.transData.inverted().transform(middle)
    axes.text(x, y, label, fontsize=8, color="#4a5568", ha="center", va="center", bbox=style)

"""The picture of a layer's journey."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from .boxes import Area, Box
from .journey import Arrival, Departure, Journey, Matrix

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, PALE, EDGE = "#222222", "#666666", "#999999"
# Where things stand, in inches: the picture, source and target matrices, and a target's height.
WIDTH, SOURCE, TARGET, SIDE = 10.0, 2.25, 5.3, 1.5
_SLOT, _LEAST, _GAP = 0.36, 1.1, 0.08

Colour = tuple[float, float, float]


def draw_journey(way: Journey) -> Figure:
    """A band for each source tensor: its rows on the left, the targets' on the right."""
    heights = [_height(one) for one in way.departures]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.45 * len(heights) + 0.3), dpi=110)
    total, top = figure.get_figheight(), figure.get_figheight() - 0.3
    figure.text(SOURCE / WIDTH, top / total + 0.005, "source", color=PALE, fontsize=9)
    figure.text(TARGET / WIDTH, top / total + 0.005, "target", color=PALE, fontsize=9)
    for departure, height in zip(way.departures, heights, strict=True):
        top -= height + 0.1
        axes = figure.add_axes((0, top / total, 1, height / total))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.axis("off")
        _band(axes, departure, height)
        top -= 0.35
    return figure


def _height(departure: Departure) -> float:
    return max(_LEAST, _SLOT * len(departure.shown))


def _band(axes: Axes, departure: Departure, height: float) -> None:
    """A source tensor, its targets one below the other, and ribbons between them."""
    _words(axes, departure, height)
    source = departure.matrix, height
    parts, shown = departure.parts, departure.shown
    rows = sum(one.matrix.rows for one in shown)
    room, top = height - _GAP * (len(shown) - 1), 0.0
    for index, arrival in enumerate(shown):
        size = room * arrival.matrix.rows / rows
        shade = 0.45 * index / max(1, len(shown) - 1)
        for part, box in arrival.boxes:
            colour = _mixed(_colour(parts.index(part)), shade)
            _box(axes, box, colour, source, (arrival.matrix, top, size))
        _frame(axes, TARGET, top, size)
        _name(axes, arrival, top + size / 2)
        top += size + _GAP
    _frame(axes, SOURCE, 0, height)
    if more := len(departure.arrivals) - len(shown):
        text = f"and {more} more"
        axes.text(TARGET, height + 0.02, text, va="top", fontsize=7.5, color=PALE)


def _words(axes: Axes, departure: Departure, height: float) -> None:
    """The source tensor's name, and its parts in their colours."""
    x, parts = SOURCE - 0.15, departure.parts
    name = _lines(departure.matrix)
    axes.text(x, 0.02, name, ha="right", va="top", fontsize=7.5, color=INK)
    for index, part in enumerate(parts):
        axes.text(
            x, height - 0.15 * (len(parts) - index), part, ha="right", va="top", fontsize=7.5,
            color=_colour(index), fontweight="bold",
        )  # fmt: skip


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _box(
    axes: Axes, box: Box, colour: Colour, source: tuple[Matrix, float],
    target: tuple[Matrix, float, float],
) -> None:  # fmt: skip
    """The same elements on both sides, and a ribbon between."""
    src = _place(box.src, source[0], SOURCE, 0, source[1])
    dst = _place(box.dst, *target[:1], TARGET, *target[1:])
    alpha = 1.0 if box.exact else 0.5
    for x, y, width, height in (src, dst):
        axes.add_patch(Rectangle((x, y), width, height, color=colour, alpha=alpha, lw=0))
    left, right = SOURCE + SIDE, TARGET
    ribbon = [
        (left, src[1]), (right, dst[1]), (right, dst[1] + dst[3]), (left, src[1] + src[3]),
    ]  # fmt: skip
    axes.add_patch(Polygon(ribbon, color=colour, alpha=0.22, lw=0))


def _place(
    area: Area, matrix: Matrix, x: float, y: float, height: float
) -> tuple[float, float, float, float]:
    """An area of a matrix on the paper: x, y, width, height."""
    across, down = SIDE / matrix.columns, height / matrix.rows
    return (
        x + area.left * across, y + area.top * down,
        (area.right - area.left) * across, (area.bottom - area.top) * down,
    )  # fmt: skip


def _frame(axes: Axes, x: float, y: float, height: float) -> None:
    axes.add_patch(Rectangle((x, y), SIDE, height, fill=False, edgecolor=EDGE, lw=0.8))


def _name(axes: Axes, arrival: Arrival, y: float) -> None:
    text = f"{arrival.matrix.name}\n{arrival.file}, {_size(arrival.matrix)}"
    axes.text(TARGET + SIDE + 0.1, y, text, va="center", fontsize=7.2, color=INK)


def _lines(matrix: Matrix) -> str:
    """A name in lines that fit, and the size."""
    lines = [""]
    for word in matrix.name.split("."):
        if len(lines[-1]) + len(word) > 30:
            lines.append("")
        lines[-1] += word + "."
    lines[-1] = lines[-1].removesuffix(".")
    return "\n".join([*lines, _size(matrix)])


def _size(matrix: Matrix) -> str:
    return f"{matrix.rows:,} × {matrix.columns:,} {matrix.dtype}"


def _mixed(colour: str, white: float) -> Colour:
    red, green, blue = (part + (1 - part) * white for part in to_rgb(colour))
    return red, green, blue

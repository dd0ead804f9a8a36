"""The charts of a report: bytes by kind, errors by layer, stages in time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ..bars import size
from ..timeline import SPANS
from ..timings import Timings
from .draw import INK, PALE, PALETTE, WIDTH
from .facts import Grid, Sizes

# Above these, numbers in the cells of a heat map can't be read.
_ROWS, _COLUMNS = 24, 10
# With more columns than this, their names stand aslant.
_LEVEL = 7


def draw_sizes(kinds: Mapping[str, Sizes]) -> Figure:
    """Two bars for each kind."""
    figure = Figure(figsize=(WIDTH, 0.55 * len(kinds) + 0.7), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    at = np.arange(len(kinds))
    for shift, name, colour in ((-0.2, "source", PALETTE[4]), (0.2, "target", PALETTE[0])):
        values = [getattr(one, name) for one in kinds.values()]
        bars = axes.barh(at + shift, values, 0.38, label=name, color=colour)
        axes.bar_label(bars, [size(value) for value in values], padding=3, fontsize=8, color=INK)
    axes.set_yticks(at, list(kinds), fontsize=9)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.margins(x=0.12)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_errors(grid: Grid) -> Figure:
    """A cell for each layer and part."""
    rows, columns = len(grid.rows), len(grid.columns)
    height = min(9.0, max(1.6, 0.3 * rows + 1.2)) + (0.9 if columns > _LEVEL else 0.0)
    figure = Figure(figsize=(WIDTH, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    cells = np.full((rows, columns), np.nan)
    for (layer, column), error in grid.values.items():
        cells[grid.rows.index(layer), grid.columns.index(column)] = error
    axes.set_facecolor("#eeeeee")
    most, least = np.nanmax(cells), np.nanmin(cells)
    # From zero on, weights that are all alike would all be dark.
    image = axes.imshow(
        cells, aspect="auto", cmap=_heat(), vmin=min(least, 0.8 * most), vmax=most,
        interpolation="nearest",
    )  # fmt: skip
    _name_cells(axes, grid)
    bar = figure.colorbar(image, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=8)
    if rows <= _ROWS and columns <= _COLUMNS:
        _write_cells(figure, cells)
    return figure


def _name_cells(axes: Axes, grid: Grid) -> None:
    """Parts above, layers at the left."""
    axes.tick_params(axis="x", bottom=False, top=True, labelbottom=False, labeltop=True)
    axes.set_xticks(range(len(grid.columns)), grid.columns, fontsize=8)
    if len(grid.columns) > _LEVEL:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="left", rotation_mode="anchor")
    step = max(1, len(grid.rows) // _ROWS)
    names = ["outside" if row < 0 else str(row) for row in grid.rows[::step]]
    axes.set_yticks(range(0, len(grid.rows), step), names, fontsize=8)
    axes.set_ylabel("layer", fontsize=9, color=PALE)


def _heat() -> ListedColormap:
    """From pale to a brown on which black can still be read."""
    return ListedColormap(colormaps["YlOrBr"](np.linspace(0.0, 0.6, 256)))


def _write_cells(figure: Figure, cells: npt.NDArray[np.float64]) -> None:
    for row, column in np.argwhere(~np.isnan(cells)):
        figure.axes[0].text(
            column, row, f"{cells[row, column]:.4f}", ha="center", va="center", fontsize=7.5,
            color=INK,
        )  # fmt: skip


def draw_stages(times: Timings) -> Figure:
    """A band for each stage that was busy: how many threads' worth, over the run's seconds."""
    timeline = times.timeline
    stages = [name for name in times.stages if name in timeline.busy]
    figure = Figure(figsize=(WIDTH, 0.45 * max(1, len(stages)) + 0.6), dpi=110)
    bands = figure.subplots(max(1, len(stages)), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.1, right=0.97, top=0.96, bottom=0.45 / figure.get_figheight())
    edges = np.arange(SPANS + 1) * timeline.width
    for index, (axes, name) in enumerate(zip(bands, stages, strict=False)):
        share = np.array(timeline.busy[name]) / timeline.width
        axes.stairs(share, edges, fill=True, color=PALETTE[index % len(PALETTE)])
        axes.set_ylim(0, max(1.0, share.max()))
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axes.set_yticks([max(1.0, round(share.max()))])
        axes.tick_params(labelsize=7, labelbottom=axes is bands[-1])
        axes.spines[["top", "right"]].set_visible(False)
    bands[-1].set_xlim(0, max(times.elapsed, timeline.width))
    bands[-1].set_xlabel("seconds", fontsize=8, color=PALE)
    return figure

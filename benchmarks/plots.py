"""Plots from recorded results.

    python -m benchmarks.plots [RESULTS.json ...] [--out docs/images]

For each card: `<card>-peers` (the share of the copy's rate, fuseport and each peer, dense and
experts), `<card>-stages` (a first call and an export by stage) and `<card>-scaling` (time against
bytes, tensors and tp), as SVG and PNG. What a file does not have is left out; nothing is made up.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
Row = dict[str, Any]
Results = dict[str, Any]
OWN, OTHER = "#1b7f5c", "#9aa5b1"
STAGES = ("plan", "tables", "launch")
matplotlib.rcParams.update(
    {
        "axes.axisbelow": True,
        "font.size": 9,
        # Text stays text, and a file's ids are the same whenever its figures are.
        "svg.fonttype": "none",
        "svg.hashsalt": "fuseport",
    }
)


def rows(results: Results, suite: str) -> list[Row]:
    """A suite's rows; none if it was not run."""
    found: list[Row] = results["suites"].get(suite, {}).get("rows", [])
    return found


def source(results: Results, suite: str) -> str:
    """Where a plot's figures come from."""
    known = results["suites"][suite]
    libraries = ", ".join(f"{n} {known['versions'][n]}" for n in ("torch", "triton"))
    return f"{results['card']}, {libraries}, {known['date']}, `{known['command']}`"


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, height), squeeze=False)
    for one in axes[0]:
        one.grid(axis="x", alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _legend(panel: Axes) -> None:
    """Below the panel, where nothing is drawn."""
    panel.legend(
        frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12)
    )


def peers(results: Results) -> Figure | None:
    """Bars of shares: a panel a scheme, a group a way, both models."""
    found = [row for row in rows(results, "peers") if row["share"] is not None]
    if not found:
        return None
    schemes, cases = (unique(row[key] for row in found) for key in ("scheme", "case"))
    figure, panels = _panels(len(schemes), 3.6)
    for panel, scheme in zip(panels, schemes, strict=True):
        _shares(panel, [row for row in found if row["scheme"] == scheme], cases)
        panel.set_title(SCHEMES.get(scheme, scheme))
    panels[0].set_xlabel("share of a device-to-device copy's rate")
    _legend(panels[-1])
    figure.text(0.01, 0.01, source(results, "peers"), fontsize=6, color="#555")
    return figure


SCHEMES = {
    "bf16": "bf16 → bf16",
    "given": "bf16 → e4m3, given scales",
    "block": "bf16 → e4m3, 128 × 128 scales",
}


def _shares(panel: Axes, found: Sequence[Row], cases: Sequence[str]) -> None:
    ways = unique(row["way"] for row in found)[::-1]
    height = 0.8 / len(cases)
    for number, case in enumerate(cases):
        shares = {row["way"]: row["share"] for row in found if row["case"] == case}
        places = [ways.index(way) - (number - (len(cases) - 1) / 2) * height for way in shares]
        colours = [OWN if "fuseport" in way else OTHER for way in shares]
        bars = panel.barh(
            places, list(shares.values()), height, color=colours, label=case,
            alpha=1 - 0.4 * number / max(1, len(cases) - 1), edgecolor="white",
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    panel.set_yticks(range(len(ways)), ways)
    panel.axvline(1, color="#333", linewidth=0.8, linestyle=":")
    panel.set_xlim(0, 1.2)


def stages(results: Results) -> Figure | None:
    """A first call by stage, and the busy times of an export, which overlap."""
    first = [r for r in rows(results, "models") if r["way"] == "first call"]
    exports = [r for r in rows(results, "export") if "busy kernel" in r["details"]]
    drawn: list[tuple[str, Callable[[Axes], None]]] = []
    if first:
        drawn.append(("first call, GPU → GPU (ms)", lambda panel: _first_calls(panel, first)))
    if exports:
        drawn.append(("export: busy seconds by stage", lambda panel: _exports(panel, exports)))
    if not drawn:
        return None
    figure, panels = _panels(len(drawn), 3.6)
    for panel, (title, draw) in zip(panels, drawn, strict=True):
        draw(panel)
        panel.set_title(title)
        _legend(panel)
    figure.text(
        0.01, 0.01, source(results, "models" if first else "export"), fontsize=6, color="#555"
    )
    return figure


def _first_calls(panel: Axes, found: Sequence[Row]) -> None:
    labels = [f"{row['case']}\n{row['scheme']}" for row in found]
    parts = {stage: [1e3 * row["details"][stage] for row in found] for stage in STAGES}
    _stack(panel, labels, parts)
    for place, row in enumerate(found):
        copy = 1e3 * row["seconds"] * row["share"]
        panel.plot([copy, copy], [place - 0.4, place + 0.4], color="#c0392b", linewidth=1.5)
    panel.plot([], [], color="#c0392b", label="a copy of as many bytes")


def _exports(panel: Axes, found: Sequence[Row]) -> None:
    names = [name for name in found[0]["details"] if name.startswith("busy ")]
    parts = {
        name.removeprefix("busy "): [row["details"][name] for row in found]
        for name in names
        if any(row["details"][name] for row in found)
    }
    _stack(panel, [row["case"] for row in found], parts)
    for place, row in enumerate(found):
        panel.plot([row["seconds"]], [place], marker="|", markersize=24, color="#c0392b")
    panel.plot([], [], color="#c0392b", label="the call's time: stages overlap")


def _stack(panel: Axes, labels: Sequence[str], parts: dict[str, list[float]]) -> None:
    begins = [0.0] * len(labels)
    for name, values in parts.items():
        panel.barh(range(len(labels)), values, 0.6, left=begins, label=name)
        begins = [a + b for a, b in zip(begins, values, strict=True)]
    panel.set_yticks(range(len(labels)), labels, fontsize=7)
    panel.invert_yaxis()


# Label, the detail on the x axis, its unit, and how the cases begin and end.
AXES = (
    ("bytes of the source (GB)", "source_bytes", 1e9, "dense, ", "GB"),
    ("tensors, of the same bytes in all", "tensors", 1, "dense, hidden size", ""),
    ("tensor parallel size of the target", "tp", 1, "llama-3-8b to tp", ""),
)


def scaling(results: Results) -> Figure | None:
    """Time against bytes, tensors and tp, each way a line."""
    found = rows(results, "scaling")
    if not found:
        return None
    figure, panels = _panels(len(AXES), 3.4)
    for panel, (label, detail, unit, begin, end) in zip(panels, AXES, strict=True):
        chosen = [r for r in found if r["case"].startswith(begin) and r["case"].endswith(end)]
        _lines(panel, chosen, detail, unit)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time (ms)")
    figure.text(0.01, 0.01, source(results, "scaling"), fontsize=6, color="#555")
    return figure


def _lines(panel: Axes, found: Sequence[Row], detail: str, unit: float) -> None:
    for way in unique(row["way"] for row in found):
        points = sorted(
            (row["details"][detail] / unit, 1e3 * row["seconds"])
            for row in found
            if row["way"] == way
        )
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    if found:
        panel.legend(frameon=False, fontsize=7)


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "peers": peers,
    "stages": stages,
    "scaling": scaling,
}


def draw(path: Path, out: Path) -> list[Path]:
    """Every plot that a file has figures for; the files that were written."""
    results = json.loads(path.read_text())
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in PLOTS.items():
        figure = make(results)
        if figure is None:
            continue
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        for ending in ("svg", "png"):
            file = out / f"{path.stem}-{name}.{ending}"
            # No date: the same figures give the same file.
            metadata = {"Date": None} if ending == "svg" else {}
            figure.savefig(file, dpi=130, metadata=metadata, bbox_inches="tight")
            written.append(file)
        plt.close(figure)
    return written


def main() -> None:
    """Draw and name the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    given = parser.parse_args()
    for path in given.results or sorted((HERE / "results").glob("*.json")):
        for file in draw(path, given.out):
            print(file)


if __name__ == "__main__":
    main()

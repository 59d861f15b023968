"""The figures of the report: drawn once with matplotlib, written as PNG files and as SVG that follows the page's theme.

Every colour of a figure is one of `THEME`; in the SVG each becomes a CSS variable of the page, so that one drawing
serves light, dark and print. Text stays text. No torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipelines.report.record import AxisImportance, Metrics

# CSS variable of the page -> its colour in the PNG files.
THEME = {"ink": "#23201d", "muted": "#76706a", "faint": "#bdb7b0", "grid": "#e8e4df", "accent": "#b1521b"}
INK, MUTED, FAINT, GRID, ACCENT = THEME.values()
MODEL_COLOURS = {"teacher": INK, "pruned": MUTED, "student": ACCENT}
SIZE = (5.0, 3.1)  # inches

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}


@contextmanager
def canvas(size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def save(figure: Figure, name: str, directory: Path) -> str:
    """Write <directory>/<name>.png and return the figure as themed SVG for the page."""
    figure.savefig(directory / f"{name}.png", dpi=160, metadata={"Software": None})
    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return themed(text.getvalue(), name)


def themed(svg: str, name: str) -> str:
    """A standalone SVG made ready to stand inside a page: CSS variables as colours, unique ids, the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r"(font: [0-9.]+px) [^;\"]+", r"\1 var(--sans)", svg)
    for variable, colour in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def curves(
    metrics: Metrics,
    key: str,
    label: str,
    name: str,
    directory: Path,
    references: Sequence[tuple[str, float]] = (),
) -> str | None:
    """Train and validation values of `key` over steps, with horizontal reference lines. None: nothing to draw."""
    train, validation = metrics.series("train", key), metrics.series("validation", key)
    if not train and not validation:
        return None
    with canvas() as (figure, axes):
        if train:
            axes.plot(*zip(*train, strict=True), color=FAINT, linewidth=1.1, label="train")
        if validation:
            axes.plot(*zip(*validation, strict=True), color=ACCENT, marker="o", markersize=3.2, label="validation")
        values = [value for _, value in train + validation]
        if min(values) > 0 and max(values) > 20 * min(values):
            log_scale(axes)
        for text, value in references:
            line = axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            line.set_label(f"{text} {value:.3f}")
        _over_steps(figure, axes, label)
        return save(figure, name, directory)


def validations(metrics: Metrics, keys: Mapping[str, str], label: str, name: str, directory: Path) -> str | None:
    """What validations measured, one line per key that has values. keys: {key of a row: its name in the legend}."""
    series = {title: points for key, title in keys.items() if (points := metrics.series("validation", key))}
    if not series:
        return None
    with canvas() as (figure, axes):
        for number, (title, points) in enumerate(series.items()):
            axes.plot(*zip(*points, strict=True), **_line(number), marker="o", markersize=3.2, label=title)
        _over_steps(figure, axes, label)
        return save(figure, name, directory)


def _line(number: int) -> dict[str, str]:
    """Colour and style of one line of several; the first in the accent colour."""
    colour = ACCENT if number == 0 else (INK, MUTED, FAINT)[(number - 1) % 3]
    return {"color": colour, "linestyle": ("-", "--", ":", "-.")[number % 4]}


def _over_steps(figure: Figure, axes: Axes, label: str) -> None:
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper right", ncols=4, columnspacing=1.4)


def importance(axis: AxisImportance, name: str, directory: Path) -> str:
    """What was scored on one axis, kept units in the accent colour, dropped ones in grey."""
    with canvas() as (figure, axes):
        if axis.name in ("layers", "removals"):
            _draw_layers(axes, axis)
        elif len(axis.scores) == 1:
            _draw_ranked(axes, axis)
        elif max(len(scores) for scores in axis.scores) <= 64:
            _draw_units(axes, axis)
        else:
            _draw_ranges(axes, axis)
        handles = [
            pyplot.Line2D([], [], color=colour, marker="s", linestyle="", markersize=6, label=label)
            for colour, label in zip((ACCENT, FAINT), axis.words, strict=True)
            if colour == ACCENT or axis.kept_units < axis.units
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, handletextpad=0.2)
        return save(figure, name, directory)


def _draw_layers(axes: Axes, axis: AxisImportance) -> None:
    """One bar per layer, or per block at its first layer."""
    scores, kept = axis.scores[0], axis.kept[0]
    numbers = np.arange(1, len(scores) + 1)
    axes.bar(numbers, scores, width=0.7, color=[ACCENT if keep else FAINT for keep in kept])
    axes.set(xlabel="first layer of the block" if axis.unit == "blocks" else "layer", ylabel=axis.label)
    _layer_ticks(axes, len(scores))


def _draw_ranked(axes: Axes, axis: AxisImportance) -> None:
    """Units of the whole model in descending order."""
    order = np.argsort(-axis.scores[0], kind="stable")
    scores, kept = axis.scores[0][order], axis.kept[0][order]
    logarithmic = scores.min() > 0 and scores.max() > 20 * scores.min()
    floor = scores.min() * 0.8 if logarithmic else min(scores.min(), 0.0)
    edges = np.arange(len(scores) + 1) + 0.5
    for mask, colour in ((kept, ACCENT), (~kept, FAINT)):
        axes.stairs(np.where(mask, scores, np.nan), edges, baseline=floor, fill=True, color=colour, linewidth=0)
    axes.set(xlabel=f"{axis.unit}, by score", ylabel=axis.label)
    axes.margins(x=0.01)
    if logarithmic:
        log_scale(axes)
    axes.set_ylim(bottom=floor)


def _draw_units(axes: Axes, axis: AxisImportance) -> None:
    """One dot per unit in its layer: few units per layer, such as heads."""
    for layer, (scores, kept) in enumerate(zip(axis.scores, axis.kept, strict=True), start=1):
        for mask, colour in ((~kept, FAINT), (kept, ACCENT)):
            axes.scatter(np.full(mask.sum(), layer), scores[mask], s=22, color=colour, linewidths=0)
    axes.set(xlabel="layer", ylabel=axis.label)
    _layer_ticks(axes, len(axis.scores))


def _draw_ranges(axes: Axes, axis: AxisImportance) -> None:
    """The 5th to 95th percentile and the median of kept and of dropped units, side by side in each layer."""
    for layer, (scores, kept) in enumerate(zip(axis.scores, axis.kept, strict=True), start=1):
        for mask, colour, shift in ((~kept, FAINT, -0.16), (kept, ACCENT, 0.16)):
            if not mask.any():
                continue
            low, middle, high = np.percentile(scores[mask], (5, 50, 95))
            axes.vlines(layer + shift, low, high, color=colour, linewidth=3.2)
            axes.scatter([layer + shift], [middle], s=16, color=INK, linewidths=0, zorder=3)
    axes.set(xlabel="layer", ylabel=axis.label)
    values = np.concatenate(axis.scores)
    if values.min() > 0 and values.max() > 20 * np.median(values):
        log_scale(axes)
    _layer_ticks(axes, len(axis.scores))


def log_scale(axes: Axes) -> None:
    """Logarithmic, plain numbers at 1, 2 and 5: matplotlib's own labels are formulas, which SVG text cannot show."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_tick_params(which="minor", length=0)


def _layer_ticks(axes: Axes, layers: int) -> None:
    stride = max(1, -(-layers // 16))
    axes.set_xticks(range(1, layers + 1, stride))
    axes.set_xlim(0.4, layers + 0.6)
    axes.grid(visible=False, axis="x")


def candidates(points: Sequence[tuple[float, dict[str, Any]]], label: str, name: str, directory: Path) -> str:
    """Losses of a search's candidates (report/search.py) over x: as measured, and an arrow to what followed."""
    with canvas() as (figure, axes):
        for x, row in points:
            after = row["validation"] if row["distilled"] is None else row["distilled"]
            axes.scatter(x, row["measured"], s=26, color=FAINT, linewidths=0, zorder=2)
            if after is None:
                continue
            colour = ACCENT if row["won"] else INK
            arrow = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.9}
            axes.annotate("", (x, after), (x, row["measured"]), arrowprops=arrow, zorder=1)
            axes.scatter(x, after, s=46 if row["won"] else 30, color=colour, linewidths=0, zorder=3)
            if row["won"]:
                middle = sum(place for place, _ in points) / len(points)
                offset, side = ((-8, -4), "right") if x > middle else ((8, -4), "left")
                given = {"xytext": offset, "textcoords": "offset points", "fontsize": 8.5, "ha": side}
                axes.annotate(row["name"], (x, after), color=ACCENT, **given)
        axes.set(xlabel=label, ylabel="loss, nats/token")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.margins(0.12)
        return save(figure, name, directory)


def _short(value: float) -> str:
    """0.72, 950, 32,000, 450M"""
    if value >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, name: str, directory: Path
) -> str:
    """One line per name over x, both axes logarithmic; the first in the accent colour."""
    with canvas() as (figure, axes):
        for number, (label, points) in enumerate(series.items()):
            axes.plot(*zip(*points, strict=True), **_line(number), marker="o", markersize=3.2, label=label)
        log_scale(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for points in series.values() for x, _ in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=xlabel, ylabel=ylabel)
        figure.legend(loc="outside upper right", ncols=3, columnspacing=1.4)
        return save(figure, name, directory)


def repeated(
    values: Mapping[str, Sequence[float]], reference: tuple[str, float], xlabel: str, name: str, directory: Path
) -> str:
    """A row per label: a dot for each value and a bar at their mean. reference: a vertical line and what it is."""
    with canvas((7.0, 0.9 + 0.36 * len(values))) as (figure, axes):
        for row, found in enumerate(values.values()):
            axes.plot(found, [row] * len(found), "o", color=ACCENT, markersize=4.5, alpha=0.75)
            axes.plot([sum(found) / len(found)], [row], "|", color=INK, markersize=13, markeredgewidth=1.6)
        word, place = reference
        axes.axvline(place, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(word, (place, -0.75), xytext=(4, 0), textcoords="offset points", color=MUTED, va="center")
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -1.1)
        axes.set_xlabel(xlabel)
        return save(figure, name, directory)

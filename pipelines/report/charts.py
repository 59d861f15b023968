"""Figures of the evaluation, of variants against each other and of several runs, in the style of plots.py. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.report.plots import ACCENT, FAINT, GRID, INK, MODEL_COLOURS, MUTED, canvas, save

# Told apart without colour too: by marker and by line.
MARKERS = {"teacher": "D", "pruned": "s", "student": "o"}
LINES = {"teacher": "--", "pruned": ":", "student": "-"}
KINDS = {  # of variants: colour, marker, filled, name in the legend
    "teacher": (INK, "D", True, "teacher"),
    "pruned": (MUTED, "s", True, "pruned"),
    "student": (ACCENT, "o", True, "distilled"),
    "quantized": (ACCENT, "^", True, "quantized"),
    "step": (INK, "o", False, "step"),
    "candidate": (MUTED, "s", False, "candidate of the search"),
}


def by_model(
    series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, name: str, directory: Path
) -> str:
    """One line per model."""
    with canvas() as (figure, axes):
        for role, points in series.items():
            axes.plot(*zip(*points, strict=True), **_look(role), markersize=3.4, label=role)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        places = [x for points in series.values() for x, _ in points]
        if min(places) > 0 and max(places) > 32 * min(places):  # bands that double
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        else:
            axes.set_xlim(left=0)
        figure.legend(loc="outside upper right", ncols=3, columnspacing=1.4)
        return save(figure, name, directory)


def _look(role: str) -> dict[str, str]:
    colours = {"color": MODEL_COLOURS.get(role, MUTED)}
    return colours | {"marker": MARKERS.get(role, "v"), "linestyle": LINES.get(role, "-.")}


def reliability(series: Mapping[str, Sequence[tuple[float, float, float]]], name: str, directory: Path) -> str:
    """Accuracy over confidence with the diagonal of a model that is as sure as it is right; the area of a dot is the
    share of tokens."""
    with canvas((5.0, 3.8)) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        for role, points in series.items():
            x, y, shares = zip(*points, strict=True)
            look = _look(role)
            axes.plot(x, y, color=look["color"], linestyle=look["linestyle"], linewidth=1.2)
            areas = [6 + 160 * share for share in shares]
            axes.scatter(x, y, s=areas, color=look["color"], marker=look["marker"], linewidths=0, zorder=3, alpha=0.85)
            axes.plot([], [], **look, markersize=4.5, label=role)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        figure.legend(loc="outside upper right", ncols=3, columnspacing=1.4)
        return save(figure, name, directory)


def dots(
    rows: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]], xlabel: str, name: str, directory: Path
) -> str:
    """A row per label, a mark per model with its interval; "<model>, published" is hollow."""
    with canvas((5.0, 1.15 + 0.4 * len(rows))) as (figure, axes):
        drawn: set[str] = set()
        for place, series in enumerate(rows.values()):
            values = [value for value, _, _ in series.values()]
            axes.plot([min(values), max(values)], [place] * 2, color=GRID, linewidth=2.2, zorder=1)
            for label, (value, low, high) in series.items():
                role = label.partition(",")[0]
                colour, shift = MODEL_COLOURS.get(role, MUTED), {"teacher": -0.12, "student": 0.12}.get(role, 0.0)
                if low is not None and high is not None:
                    axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.2, zorder=2)
                face = "none" if label != role else colour
                mark = {"marker": MARKERS.get(role, "v"), "s": 34, "facecolors": face, "edgecolors": colour}
                known = {} if label in drawn else {"label": label}
                axes.scatter(value, place + shift, **mark, linewidths=1.2, zorder=3, **known)
                drawn.add(label)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel)
        figure.legend(loc="outside upper right", ncols=3, columnspacing=1.2, handletextpad=0.2)
        return save(figure, name, directory)


def variants(
    points: Sequence[tuple[float, dict[str, Any]]],
    front: Sequence[tuple[float, float]],
    xlabel: str,
    name: str,
    directory: Path,
    *,
    arrows: bool = False,
) -> str:
    """Loss over size or speed. points: (x, row of variants.rows); front: (x, loss) of the Pareto front, drawn as steps
    of a pale line. arrows: from each run's pruned model to its student."""
    with canvas((5.0, 3.5)) as (figure, axes):
        if len(front) > 1:
            axes.plot(*zip(*sorted(front), strict=True), color=FAINT, linewidth=1.0, zorder=1)
        for kind in KINDS:
            chosen = [(x, row) for x, row in points if row["kind"] == kind]
            for number, (x, row) in enumerate(chosen):
                _variant(axes, x, row, KINDS[kind][3] if number == 0 else None)
        if arrows:
            _arrows(axes, points)
        _names(axes, [(x, row) for x, row in points if row["kind"] != "candidate" and row.get("label", row["name"])])
        axes.set(xlabel=xlabel, ylabel="loss, nats/token")
        axes.margins(0.16)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        figure.legend(loc="outside upper right", ncols=3, columnspacing=1.2, handletextpad=0.2)
        return save(figure, name, directory)


def _variant(axes: Axes, x: float, row: dict[str, Any], label: str | None) -> None:
    colour, marker, filled, _ = KINDS[row["kind"]]
    filled = filled and row.get("measured") != "elsewhere"
    if row["interval"]:
        axes.plot([x, x], row["interval"], color=colour, linewidth=1.1, zorder=2)
    style = {"marker": marker, "facecolors": colour if filled else "none", "edgecolors": colour}
    size = 20 if row["kind"] == "candidate" else 44
    axes.scatter(x, row["loss"], s=size, linewidths=1.1, zorder=3, label=label, **style)


def _arrows(axes: Axes, points: Sequence[tuple[float, dict[str, Any]]]) -> None:
    by_run: dict[str, dict[str, tuple[float, float]]] = {}
    for x, row in points:
        by_run.setdefault(row["run"], {})[row["kind"]] = (x, row["loss"])
    for found in by_run.values():
        if "pruned" in found and "student" in found:
            arrow = {"arrowstyle": "->", "color": FAINT, "linewidth": 1.2, "shrinkA": 6, "shrinkB": 6}
            axes.annotate("", found["student"], found["pruned"], arrowprops=arrow)


def _names(axes: Axes, points: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Labels beside the marks, pushed apart where marks lie close together."""
    if not points:
        return
    heights = [height for _, row in points for height in (row["loss"], *(row["interval"] or ()))]
    right = max(x for x, _ in points)
    step = max(max(heights) - min(heights), 1e-9) * 0.075
    level = float("-inf")
    for x, row in sorted(points, key=lambda point: point[1]["loss"]):
        level = max(level + step, row["loss"])
        given = {"fontsize": 8.5, "color": KINDS[row["kind"]][0], "va": "center", "textcoords": "offset points"}
        given |= {"xytext": (-7, 5), "ha": "right"} if x > 0.62 * right else {"xytext": (7, 5), "ha": "left"}
        axes.annotate(row.get("label", row["name"]), (x, level), **given)


def overlaid(
    series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, name: str, directory: Path
) -> str:
    """The same figure of several runs over steps or tokens; told apart by colour, line and marker."""
    with canvas((5.0, 3.5)) as (figure, axes):
        for number, (label, points) in enumerate(series.items()):
            colour = (ACCENT, INK, MUTED, FAINT)[number % 4]
            look = {"linestyle": ("-", "--", ":", "-.")[number // 2 % 4], "marker": "osD^vPX*"[number % 8]}
            axes.plot(*zip(*points, strict=True), color=colour, **look, markersize=3.6, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        figure.legend(loc="outside upper right", ncols=3, columnspacing=1.4)
        return save(figure, name, directory)

"""The search for the student's shape in the report: its candidates as a table, and against size and speed. No torch."""

from pathlib import Path
from typing import Any

from pipelines.report import plots
from pipelines.report.variants import candidates

# (heading, unit, format) of the columns behind the candidate's name.
COLUMNS = (
    ("Parameters", "of the teacher", "{:,.0f}"),
    ("Predicted", "nats/token", "{:.4f}"),
    ("Measured", "nats/token", "{:.4f}"),
    ("Validation", "nats/token", "{:.4f}"),
    ("Distilled", "nats/token", "{:.4f}"),
    ("Task", "score", "{:.1%}"),
    ("Speed", "tokens/s", "{:,.0f}"),
)


def section(
    search: dict[str, Any], teacher_parameters: int | None, directory: Path, name: str = "search"
) -> dict[str, Any] | None:
    """What the page shows; None without a search. PNG files of its plots, which begin with `name`, go to the
    directory."""
    rows = candidates(search)
    if not rows:
        return None
    keys = ("parameters", "predicted", "measured", "validation", "distilled", "task", "tokens_per_second")
    shown = [place for place, key in enumerate(keys) if any(row[key] is not None for row in rows)]
    table = []
    for row in rows:
        cells = [
            "\N{EN DASH}" if row[keys[place]] is None else COLUMNS[place][2].format(row[keys[place]]) for place in shown
        ]
        if teacher_parameters:
            cells[0] += f" ({row['parameters'] / teacher_parameters:.1%})"
        table.append({"name": row["name"], "won": row["won"], "cells": cells})
    drawn = []
    for key, title, label, scale in (
        ("parameters", "Candidates against size", "parameters, millions", 1e6),
        ("tokens_per_second", "Candidates against speed", "tokens/s of a forward pass", 1.0),
    ):
        points = [(row[key] / scale, row) for row in rows if row[key]]
        if points:
            svg = plots.candidates(points, label, f"{name}_{key}", directory)
            drawn.append({"svg": svg, "title": title, "caption": _caption(rows, key, search)})
    return {
        "why": search.get("why") or "The search has not come to its end yet.",
        "head": [{"title": COLUMNS[place][0], "unit": COLUMNS[place][1]} for place in shown],
        "rows": table,
        "counts": f"{search.get('within', 0):,} candidates kept the limits, {len(rows)} were measured, "
        f"{sum(row['followed'] for row in rows)} were followed further. Speeds: {search.get('speeds')}.",
        "plots": drawn,
    }


def _caption(rows: list[dict[str, Any]], key: str, search: dict[str, Any]) -> str:
    better = "Further left is smaller" if key == "parameters" else "Further right is faster"
    after = any(row["distilled"] is not None for row in rows)
    what = "pale before distillation, dark after it" if after else "pale on calibration text, dark on validation text"
    return f"Losses, {what}; the winner by name. {better}, further down is better."

"""Tables of the page: what a cell shows of a figure, its interval and whether a difference is more than noise."""

import math
from collections.abc import Sequence
from typing import Any

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
WITHIN, BEYOND = "within noise", "larger than noise"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cell(text: str, note: str = "", *, ours: bool = False, mark: str = "") -> dict[str, Any]:
    """note: small, below the text. ours: of the student. mark: a word behind it, such as WITHIN."""
    return {"text": text, "note": note, "ours": ours, "mark": mark}


def figure(value: Any, form: str = "{:.4f}", interval: Any = None, *, ours: bool = False) -> dict[str, Any]:
    """A number with its interval as "low to high"; NONE where it is none."""
    if not is_number(value):
        return cell(NONE, ours=ours)
    return cell(form.format(value).replace("-", MINUS), between(interval, form), ours=ours)


def between(interval: Any, form: str) -> str:
    """ "2.91 to 2.95"; empty where there is no interval."""
    if not interval or len(interval) != 2 or not all(is_number(end) for end in interval):
        return ""
    return " to ".join(form.format(end).replace("-", MINUS) for end in interval)


def signed(form: str) -> str:
    """ "{:.4f}" -> "{:+.4f}": of a difference."""
    return form.replace("{:", "{:+", 1)


def noise(entry: dict[str, Any]) -> str:
    return BEYOND if entry.get("larger_than_noise") else WITHIN


def difference(entry: dict[str, Any] | None, form: str = "{:.4f}") -> dict[str, Any]:
    """A row of "differences" in results.json: the difference, its interval, and noise or not."""
    if not entry or not is_number(entry.get("difference")):
        return cell(NONE)
    shown = figure(entry["difference"], signed(form), (entry.get("low"), entry.get("high")))
    return shown | {"mark": noise(entry)}


def find(entries: Any, **wanted: Any) -> dict[str, Any] | None:
    """The first entry whose values are those wanted."""
    for entry in entries or []:
        if all(entry.get(key) == value for key, value in wanted.items()):
            return dict(entry)
    return None


def row(title: str, cells: Sequence[dict[str, Any]], note: str = "", *, ours: bool = False) -> dict[str, Any]:
    return {"title": title, "note": note, "cells": list(cells), "ours": ours, "failed": False}


def table(
    caption: str,
    head: Sequence[str | tuple[str, str]],
    rows: Sequence[dict[str, Any]],
    first: str = "",
    *,
    whole: bool = False,
) -> dict[str, Any] | None:
    """caption: for who hears the page. head: titles, or titles with units, of the columns behind the first. None
    without rows. Columns in which no row has anything are left out, unless whole."""
    if not rows:
        return None
    titles = [entry if isinstance(entry, tuple) else (entry, "") for entry in head]
    kept = [n for n in range(len(titles)) if whole or any(entry["cells"][n]["text"] != NONE for entry in rows)]
    return {
        "caption": caption,
        "first": first,
        "head": [
            {"title": titles[n][0], "unit": titles[n][1], "ours": all(entry["cells"][n]["ours"] for entry in rows)}
            for n in kept
        ],
        "rows": [entry | {"cells": [entry["cells"][n] for n in kept]} for entry in rows],
    }


def bytes_in_words(count: Any) -> str:
    """4_500_000 -> "4.50 MB"; 16e9 -> "16.0 GB"."""
    if not is_number(count):
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:,.0f} B"

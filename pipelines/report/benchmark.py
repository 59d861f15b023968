"""The benchmark's table and plots, from the rows that its runs left on disk. No torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.files import write_atomic

PAGE = "benchmark.md"
LAYOUT = ("tensor_parallel", "dtype", "device", "threads")

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a row is of. file: where rows lie; memory: the key of its bytes; sizes: {key: heading} of what else tells
    rows of different work apart; figures: {key: (heading, format)} of what it has beside memory and seconds; measure:
    the contender to whose memory and time the others' are held, and the heading of that."""

    file: str
    memory: str
    sizes: dict[str, str]
    figures: dict[str, tuple[str, str]]
    measure: tuple[str, str] = ("nemo", "of NeMo's")

    @property
    def headings(self) -> list[str]:
        of = self.measure[1]
        return ["", "memory", of, "seconds", of, *(heading for heading, _ in self.figures.values())]

    def key(self, row: Row) -> tuple[Any, ...]:
        return (row["name"], *self.work(row))

    def work(self, row: Row) -> tuple[Any, ...]:
        """The same for contenders that can be compared."""
        return tuple(row.get(name) for name in (*LAYOUT, *self.sizes))


HEADS = Kind(
    "results.json",
    "peak_bytes_beyond_gradients",
    {"vocabulary": "ids", "tokens": "tokens", "student_hidden": "hidden", "teacher_hidden": "teacher's"},
    {"share_of_ceiling": ("of ceiling", "{:.0%}"), "relative_error": ("error", "{:.1e}")},
)
STEPS = Kind(
    "steps.json",
    "peak_bytes_beyond_state",
    {
        "student_parameters": "parameters",
        "teacher_parameters": "teacher's",
        "vocabulary": "ids",
        "sequence_length": "sequence",
        "micro_batch_size": "micro batch",
    },
    {
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "share_of_ceiling": ("of ceiling", "{:.0%}"),
        "largest_micro_batch": ("largest micro batch", "{}"),
    },
)


SCORING = Kind(
    "scoring.json",
    "peak_bytes",
    {"parameters": "parameters", "sequence_length": "sequence", "micro_batch_size": "micro batch"},
    {"tokens_per_second": ("tokens/s", "{:,.0f}")},
    ("forward", "of forward"),
)


def read(directory: Path, kind: Kind) -> list[Row]:
    path = directory / kind.file
    return json.loads(path.read_text()) if path.is_file() else []


def merged(before: list[Row], rows: list[Row], kind: Kind) -> list[Row]:
    """`before` with `rows`, which replace those of the same contender, work and layout."""
    return list(({kind.key(row): row for row in before} | {kind.key(row): row for row in rows}).values())


def cells(row: Row, rows: Iterable[Row], kind: Kind) -> list[str]:
    """A row of a table under kind.headings. rows: among them the measure's of the same work, where there is one."""
    if row.get("reason"):
        return [row["name"], "not run", *[""] * (len(kind.headings) - 2)]
    same = (r for r in rows if r["name"] == kind.measure[0] and not r.get("reason") and kind.work(r) == kind.work(row))
    base = next(same, None)
    figures = [(row.get(key), form) for key, (_, form) in kind.figures.items()]
    return [
        row["name"],
        f"{row[kind.memory] / 1e6:,.1f} MB",
        _ratio(row, base, kind.memory),
        f"{row['seconds']:.4f}",
        _ratio(row, base, "seconds"),
        *("" if value is None else form.format(value) for value, form in figures),
    ]


def reasons(rows: Iterable[Row]) -> list[str]:
    """Why some contenders were not run, each once."""
    return list(dict.fromkeys(f"{row['name']}: {row['reason']}" for row in rows if row.get("reason")))


def _ratio(row: Row, base: Row | None, key: str) -> str:
    return f"{row[key] / base[key]:.3f}" if base is not None and base[key] else ""


def write(source: Path, directory: Path) -> Path:
    """Table and plots of the rows in source into directory. Returns the page, Markdown."""
    directory.mkdir(parents=True, exist_ok=True)
    heads, steps, scoring = (read(source, kind) for kind in (HEADS, STEPS, SCORING))
    names = draw(heads, directory)
    write_atomic(directory / PAGE, "\n".join(_page(heads, steps, scoring, names)) + "\n")
    return directory / PAGE


def _page(heads: list[Row], steps: list[Row], scoring: list[Row], plots_drawn: list[str]) -> Iterable[str]:
    yield "# Benchmark"
    yield ""
    yield "Written by `python -m pipelines stage=benchmark` from results.json, steps.json and scoring.json in"
    yield "runs/benchmark."
    if heads:
        yield ""
        yield "## Loss and both heads, forward and backward"
        yield ""
        yield "From the normed hidden states of both models and both heads to the mean forward KL at temperature 1,"
        yield "and back into the student's hidden states and head. Memory: the peak beyond inputs and gradients, on the"
        yield "largest rank. Seconds: the median of passes in turns, on the slowest rank. Error: of the gradients"
        yield "against float64, norm(g - g*) / norm(g*). Ceiling: the FLOP/s that large products reach"
        yield "here, to which those of this work, each counted once, are held."
        yield from _tables(heads, HEADS)
        for name in plots_drawn:
            yield ""
            yield f"![{name.replace('_', ' ')}]({name}.png)"
    if steps:
        yield ""
        yield "## Whole training step"
        yield ""
        yield "Both models' forward, loss, backward, reduction of gradients and optimizer; same weights, layers, data"
        yield "and layout. Memory: the peak beyond weights, gradients and optimizer."
        yield from _tables(steps, STEPS)
    if scoring:
        yield ""
        yield "## Scoring a teacher for pruning"
        yield ""
        yield "Importance by activations over some batches, beside bare forward passes over the same, in turns. Scoring"
        yield "needs no output head; the passes are measured without and with it. Memory: the peak beyond the weights."
        yield from _tables(scoring, SCORING)


def _tables(rows: list[Row], kind: Kind) -> Iterable[str]:
    """One table for each layout and machine."""
    layouts = {tuple(row.get(key) for key in LAYOUT): None for row in rows}
    for layout in sorted(layouts, key=lambda values: [str(value) for value in values]):
        tensor, dtype, device, threads = layout
        of_layout = [row for row in rows if tuple(row.get(key) for key in LAYOUT) == layout]
        dates = ", ".join(sorted({str(row.get("date")) for row in of_layout}))
        yield ""
        yield f"TP {tensor}, {dtype}, {device}, {threads} threads per process, {dates}:"
        yield ""
        headings = [*kind.sizes.values(), *kind.headings]
        yield "| " + " | ".join(headings) + " |"
        yield "|" + "---:|" * len(kind.sizes) + "---|" + "---:|" * (len(kind.headings) - 1)
        for row in sorted(of_layout, key=lambda row: [row.get(name) or 0 for name in kind.sizes]):
            sizes = [f"{row[name]:,}" for name in kind.sizes]
            yield "| " + " | ".join(sizes + cells(row, of_layout, kind)) + " |"
        for reason in reasons(of_layout):
            yield ""
            yield f"Not run: {reason}."


def draw(rows: list[Row], directory: Path) -> list[str]:
    """Memory and time over tokens, for each layout at its largest vocabulary. Returns the plots' names."""
    from pipelines.report import plots  # matplotlib: rows can be had on a machine without it

    names = []
    measured = [row for row in rows if not row.get("reason")]
    for tensor in sorted({row["tensor_parallel"] for row in measured}):
        at_layout = [row for row in measured if row["tensor_parallel"] == tensor]
        vocabulary = max(row["vocabulary"] for row in at_layout)
        for what, key, label, unit in (
            ("memory", HEADS.memory, "peak memory beyond gradients, MB", 1e6),
            ("seconds", "seconds", "seconds forward and backward", 1.0),
        ):
            series: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(at_layout, key=lambda row: row["tokens"]):
                if row["vocabulary"] == vocabulary:
                    series.setdefault(row["name"], []).append((row["tokens"], row[key] / unit))
            name = f"{what}_tp{tensor}"
            plots.lines(series, f"tokens, {vocabulary:,} ids, TP {tensor}", label, name, directory)
            names.append(name)
    return names

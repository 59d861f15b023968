"""Several runs on one page: their figures side by side, every variant against size, overlaid curves, what differs
between their settings. No torch."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipelines.report import cells, charts, decide, page, runs, sections, summary, variants
from pipelines.report.record import MODELS, RunRecord
from pipelines.report.training import plot, present

LONGEST = 32  # characters of a setting's value; the whole stands in the run's config.yaml


def results(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The content of the comparison's results.json: {"runs": {name: results of each}, "one_teacher", "decision",
    "different_settings": {setting: {run: value}}}."""
    of_runs = {record.name: summary.results(record) for record in records}
    names = list(of_runs)
    return {
        "runs": of_runs,
        "one_teacher": one_teacher(records),
        "decision": decide.in_results(decision(records, of_runs)),
        "different_settings": {
            name: dict(zip(names, values, strict=True)) for name, values in runs.different_settings(records)
        },
    }


def one_teacher(records: Sequence[RunRecord]) -> bool:
    hashes = {runs.teacher_hash(record) for record in records}
    return len(hashes) == 1 and hashes != {""}


def decision(records: Sequence[RunRecord], of_runs: dict[str, Any]) -> decide.Decision:
    """Between all variants; where the runs have several teachers, none is recommended."""
    rows = all_variants(records, of_runs)
    differences = {name: variants.differences(found) for name, found in of_runs.items()}
    if one_teacher(records):
        return decide.decide(rows, decide.Limits(), differences)
    apart = [row | {"front_size": None, "front_speed": None, "breaks": []} for row in rows]
    apart = [row | {"title": f"{row['name']} of {row['run']}"} for row in apart if row["measured"] == variants.TEST]
    why = "The runs have different teachers: what one of them lost by pruning says nothing of the others."
    return decide.Decision(apart, None, why)


def all_variants(records: Sequence[RunRecord], of_runs: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for record in records for row in variants.rows(record, of_runs[record.name])]


def render(records: Sequence[RunRecord], found: dict[str, Any], directory: Path) -> str:
    """The page as text; PNG files of its plots go to the directory. found: of `results`."""
    of_runs = found["runs"]
    decided = decision(records, of_runs)
    rows = [
        row | {"label": decide.label(row, several=True)}
        for row in _once(all_variants(records, of_runs), found["one_teacher"])
    ]
    first = next(iter(of_runs.values()))
    return (
        page.environment()
        .get_template("compare.html.jinja")
        .render(
            style=Markup((Path(__file__).parent / "page.css").read_text()),
            names=list(of_runs),
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            verdict=verdict(found),
            decision=decided.why,
            evaluated=page.evaluated_in_words(first),
            students=students(of_runs),
            plots=sections.variant_plots(rows, decided, directory) + curves(records, directory),
            tasks=tasks(of_runs),
            variants=decide.table(decided),
            settings=settings(found["different_settings"], list(of_runs)),
            origins=origins(records),
        )
    )


def _once(rows: list[dict[str, Any]], one: bool) -> list[dict[str, Any]]:
    """With one teacher for all, that teacher once."""
    teachers = [row for row in rows if row["kind"] == "teacher"]
    return [row for row in rows if not (one and any(row is other for other in teachers[1:]))]


def verdict(found: dict[str, Any]) -> str:
    """One sentence: whose student is closest to the text."""
    losses = {
        name: model["loss"]
        for name, results_ in found["runs"].items()
        if summary.usable(model := results_["models"].get("student"))
    }
    if not losses:
        return "None of these runs has an evaluated student."
    best = min(losses, key=lambda name: losses[name])
    others = ", ".join(
        f"{name} {loss:.4f}" for name, loss in sorted(losses.items(), key=lambda e: e[1]) if name != best
    )
    return f"The student of {best} has the lowest loss: {losses[best]:.4f} nats/token" + (
        f" against {others}." if others else "."
    )


def students(of_runs: dict[str, Any]) -> dict[str, Any] | None:
    """A column per run: the student's figures, and the teacher's and the pruned model's loss."""
    rows = []
    for key, title, unit, form in summary.FIGURES:
        values = [results_["models"].get("student", {}) for results_ in of_runs.values()]
        shown = [cells.figure(model.get(key), form, (model.get("intervals") or {}).get(key)) for model in values]
        rows.append(cells.row(title, shown, unit))
    for role in MODELS[:2]:
        losses = [results_["models"].get(role, {}).get("loss") for results_ in of_runs.values()]
        rows.append(cells.row(f"Loss of the {role}", [cells.figure(loss) for loss in losses], "nats/token"))
    for key, title, form in (
        ("parameters_kept", "Parameters kept", "{:.1%}"),
        ("pruning_gap_closed", "Gap closed", ""),
    ):
        values = [results_[key] for results_ in of_runs.values()]
        words = [
            cells.cell(cells.NONE if value is None else form.format(value) if form else _closed(value))
            for value in values
        ]
        rows.append(cells.row(title, words))
    return cells.table("The students of these runs", list(of_runs), rows, "Student", whole=True)


def _closed(share: float) -> str:
    return f"none: {summary.percent(-share)} wider" if share < 0 else summary.percent(share)


def tasks(of_runs: dict[str, Any]) -> dict[str, Any] | None:
    """A row per task that any run has, a column per run's student."""
    scores = [(found["tasks"].get("models") or {}).get("student") or {} for found in of_runs.values()]
    rows = []
    for task in list(dict.fromkeys(task for found in scores for task in found)):
        shown = []
        for found in scores:
            entry = found.get(task) or {}
            error = entry.get("stderr")
            shown.append(cells.figure(entry.get("value"), "{:.3f}"))
            shown[-1]["note"] = f"± {error:.3f}" if cells.is_number(error) else ""
        rows.append(cells.row(task, shown))
    return cells.table("Scores of the students on tasks", list(of_runs), rows, "Task", whole=True)


def curves(records: Sequence[RunRecord], directory: Path) -> list[dict[str, Any]]:
    """Validation losses of the distillations over each other."""
    drawn = []
    for key, label, title, caption in (
        ("ce", "cross-entropy, nats/token", "Students' losses", "Cross-entropy on the validation split."),
        ("kd", "KL, nats/token", "KL to the teacher", "KL(teacher || student) on the validation split."),
    ):
        series = {record.name: record.distil_metrics.series("validation", key) for record in records}
        series = {name: points for name, points in series.items() if points}
        if series:
            svg = charts.overlaid(series, "optimizer step", label, f"compared_{key}", directory)
            drawn.append(plot(svg, title, caption))
    return present(*drawn)


def settings(different: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    rows = [
        cells.row(setting, [cells.cell(_value(values[name])) for name in names])
        for setting, values in different.items()
    ]
    return cells.table("Settings in which the runs differ", names, rows, "Setting", whole=True)


def _value(value: Any) -> str:
    if value is None:
        return cells.NONE
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def origins(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Where each run lies and what made it."""
    rows = []
    for record in records:
        manifest = record.manifests["evaluate"]
        commit = page.short_commit(manifest.get("git") or "") or cells.NONE
        words = [str(record.directory), runs.teacher_hash(record)[:12] or cells.NONE, commit]
        words += [str(manifest["seed"]) if manifest.get("seed") is not None else cells.NONE]
        rows.append(cells.row(record.name, [cells.cell(word) for word in words]))
    return cells.table("Where the runs come from", ("directory", "teacher", "code", "seed"), rows, "Run")

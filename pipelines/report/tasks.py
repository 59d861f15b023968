"""Tasks, text that the models write, and how they behave: parts of the evaluation as the page shows them. No torch."""

from pathlib import Path
from typing import Any

from pipelines.report import cells, charts
from pipelines.report.record import MODELS

Part = dict[str, Any] | None
DIVERSITY = (
    ("distinct_1", "Distinct tokens", "{:.1%}"),
    ("distinct_2", "Distinct pairs", "{:.1%}"),
    ("distinct_3", "Distinct triples", "{:.1%}"),
    ("repetition", "Repetition", "{:.1%}"),
    ("template_rate", "Template rate", "{:.1%}"),
    ("mean_new_tokens", "New tokens, mean", "{:.1f}"),
    ("ended", "Ended by themselves", "{:.1%}"),
)


def table(found: dict[str, Any]) -> Part:
    """A row per task: each model's score with its standard error, the difference, and what was published."""
    models, published = found.get("models") or {}, found.get("published") or {}
    rows = []
    for task in _names(models):
        entries = {role: (models.get(role) or {}).get(task) or {} for role in MODELS}
        shown = [_score(entries[role], ours=role == "student") for role in MODELS]
        difference = cells.find(found.get("differences"), task=task, model="student", other="teacher")
        shown.append(cells.difference(difference, "{:.3f}"))
        shown += [cells.figure((published.get(role) or {}).get(task), "{:.3f}") for role in ("teacher", "student")]
        rows.append(cells.row(task, shown, note=_settings(next(filter(None, entries.values()), {}))))
    head = [*MODELS, f"student {cells.MINUS} teacher", ("teacher", "published"), ("student", "published")]
    return cells.table("Scores on tasks", head, rows, "Task")


def _names(models: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for found in models.values() for name in found or {}))


def _score(entry: dict[str, Any], *, ours: bool) -> dict[str, Any]:
    shown = cells.figure(entry.get("value"), "{:.3f}", ours=ours)
    if cells.is_number(entry.get("stderr")):
        shown["note"] = f"± {entry['stderr']:.3f}"
    return shown


def _settings(entry: dict[str, Any]) -> str:
    words = [str(entry["metric"])] if entry.get("metric") else []
    if cells.is_number(entry.get("shots")):
        words.append(f"{entry['shots']} shot" + ("" if entry["shots"] == 1 else "s"))
    if cells.is_number(entry.get("samples")):
        words.append(f"{entry['samples']:,} samples")
    return ", ".join(words)


def plot(found: dict[str, Any], directory: Path) -> str | None:
    models, published = found.get("models") or {}, found.get("published") or {}
    rows: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    for task in _names(models):
        rows[task] = {}
        for role in MODELS:
            entry = (models.get(role) or {}).get(task) or {}
            if cells.is_number(entry.get("value")):
                rows[task][role] = (entry["value"], *_ends(entry))
            stated = (published.get(role) or {}).get(task)
            if cells.is_number(stated):
                rows[task][f"{role}, published"] = (stated, None, None)
    rows = {task: series for task, series in rows.items() if series}
    return charts.dots(rows, "score", "tasks", directory) if rows else None


def _ends(entry: dict[str, Any]) -> tuple[float | None, float | None]:
    """The interval of a score; of a share within 0 and 1, where there is nothing beyond."""
    if not cells.is_number(entry.get("stderr")):
        return None, None
    value, half = entry["value"], 1.96 * entry["stderr"]
    return (max(value - half, 0.0), min(value + half, 1.0)) if 0 <= value <= 1 else (value - half, value + half)


def samples(found: dict[str, Any]) -> list[dict[str, Any]]:
    """By prompt, what each model wrote: [{"prompt", "texts": [{"model", "text"}]}]."""
    models = found.get("models") or {}
    by_prompt: dict[str, list[dict[str, str]]] = {}
    for role in _in_order(models):
        for sample in models[role].get("samples") or []:
            texts = by_prompt.setdefault(str(sample["prompt"]), [])
            texts.append({"model": role, "text": str(sample["text"])})
    return [{"prompt": prompt, "texts": texts} for prompt, texts in by_prompt.items()]


def diversity(found: dict[str, Any]) -> Part:
    models = found.get("models") or {}
    roles = _in_order(models)
    rows = []
    for key, title, form in DIVERSITY:
        values = [(models[role].get("diversity") or {}).get(key) for role in roles]
        if any(cells.is_number(value) for value in values):
            shown = [
                cells.figure(value, form, ours=role == "student") for role, value in zip(roles, values, strict=True)
            ]
            rows.append(cells.row(title, shown))
    return cells.table("Diversity of what the models write", roles, rows, "Figure")


def _in_order(models: dict[str, Any]) -> list[str]:
    return [role for role in MODELS if role in models] + [name for name in models if name not in MODELS]


def behaviour(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Two tables, of refusals and of toxic words: a row per category of prompts, a column per model."""
    models = found.get("models") or {}
    roles = _in_order(models)
    tables = []
    for rate, interval, caption in (
        ("refusal_rate", "refusal_interval", "Refusals"),
        ("toxic_rate", "toxic_interval", "Words of the toxicity list"),
    ):
        rows = []
        for category in _names(models):
            entries = {role: (models[role] or {}).get(category) or {} for role in roles}
            shown = [
                cells.figure(entries[role].get(rate), "{:.1%}", entries[role].get(interval), ours=role == "student")
                for role in roles
            ]
            wanted = {"category": category, "figure": rate, "model": "student", "other": "teacher"}
            shown.append(cells.difference(cells.find(found.get("differences"), **wanted), "{:.1%}"))
            prompts = next((entry["prompts"] for entry in entries.values() if entry.get("prompts")), 0)
            rows.append(cells.row(category, shown, note=f"{prompts} prompts" if prompts else ""))
        made = cells.table(caption, [*roles, f"student {cells.MINUS} teacher"], rows, "Category")
        if made:
            tables.append(made)
    return tables


def answers(found: dict[str, Any]) -> Part:
    """Some of the answers that were counted, with what was found in them."""
    rows = []
    for entry in found.get("examples") or []:
        marks = [word for word, key in (("refused", "refused"), ("toxic word", "toxic")) if entry.get(key)]
        shown = [cells.cell(str(entry[key])) for key in ("prompt", "text")] + [
            cells.cell(", ".join(marks) or cells.NONE)
        ]
        rows.append(cells.row(str(entry["model"]), shown, note=str(entry.get("category") or "")))
    return cells.table("Some of the answers", ("prompt", "answer", "counted as"), rows, "Model")

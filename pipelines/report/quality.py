"""The student's quality looked at closely: by token class, by position, by confidence, and on other text. No torch."""

from pathlib import Path
from typing import Any

from pipelines.report import cells, charts
from pipelines.report.record import MODELS

Part = dict[str, Any] | None


def token_classes(models: dict[str, dict[str, Any]]) -> Part:
    """Rows by class of token; share is the same for all models."""
    names = list(dict.fromkeys(name for model in models.values() for name in model.get("by_token_class") or {}))
    present = [role for role in MODELS if models.get(role, {}).get("by_token_class")]
    rows = []
    for name in names:
        found = {role: models[role]["by_token_class"].get(name) or {} for role in present}
        share = next((entry["share"] for entry in found.values() if cells.is_number(entry.get("share"))), None)
        shown = [cells.figure(found[role].get("loss"), ours=role == "student") for role in present]
        last = [
            cells.figure(found.get("student", {}).get(key), form, ours=True)
            for key, form in (("kl", "{:.4f}"), ("agreement", "{:.1%}"))
        ]
        rows.append(cells.row(name.replace("_", " "), [cells.figure(share, "{:.1%}"), *shown, *last]))
    head = ["share of tokens", *((f"{role}, loss", "nats/token") for role in present)]
    head += [("student, KL", "nats/token"), ("student, agreement", "top-1")]
    return cells.table("Quality by class of token", head, rows, "Class")


def entropy_bands(models: dict[str, dict[str, Any]]) -> Part:
    """KL to the teacher by bands of the teacher's entropy; keys are "<low>_<high>" in nats."""
    shown = [role for role in ("pruned", "student") if models.get(role, {}).get("kl_by_entropy")]
    rows = []
    for band in list(dict.fromkeys(band for role in shown for band in models[role]["kl_by_entropy"])):
        low, _, high = band.partition("_")
        title = f"from {low}" if high == "up" else f"{low} to {high}"
        values = [cells.figure(models[role]["kl_by_entropy"].get(band), ours=role == "student") for role in shown]
        rows.append(cells.row(title, values))
    head = [(role, "KL, nats/token") for role in shown]
    return cells.table("KL to the teacher by the teacher's entropy", head, rows, "Teacher's entropy, nats")


def reliability(models: dict[str, dict[str, Any]], directory: Path) -> str | None:
    """Accuracy over confidence, one line per model; empty bins are left out."""
    series = {
        role: [
            (entry["confidence"], entry["accuracy"], entry.get("share") or 0.0)
            for entry in models[role]["reliability"]
            if cells.is_number(entry.get("confidence"))
            and cells.is_number(entry.get("accuracy"))
            and entry.get("share")
        ]
        for role in MODELS
        if models.get(role, {}).get("reliability")
    }
    return charts.reliability(series, "reliability", directory) if any(series.values()) else None


def positions(models: dict[str, dict[str, Any]], key: str, label: str, name: str, directory: Path) -> str | None:
    """A figure over the position in the sequence."""
    series = {
        role: [
            ((entry["from"] + entry["to"]) / 2, entry[key])
            for entry in models[role]["by_position"]
            if cells.is_number(entry.get(key))
        ]
        for role in (MODELS if key == "loss" else MODELS[1:])
        if models.get(role, {}).get("by_position")
    }
    series = {role: points for role, points in series.items() if len(points) > 1}
    return charts.by_model(series, "position in the sequence, tokens", label, name, directory) if series else None


def domains(found: dict[str, Any]) -> Part:
    """Own and other text side by side: losses, and where the student differs from the teacher by more than noise."""
    rows = [_measured(name, _domain_in_words(domain), domain) for name, domain in found.items()]
    return cells.table("Quality by domain", [*MEASURED, "KL", "agreement", "bits/byte"], rows, "Text")


def long_context(found: dict[str, Any]) -> Part:
    """A row per length of the sequences, the shortest first."""
    rows = []
    for length in sorted(found, key=int):
        tokens = found[length].get("tokens")
        note = f"{tokens:,} tokens of text" if cells.is_number(tokens) else ""
        rows.append(_measured(f"{int(length):,}", note, found[length]))
    return cells.table("Quality by sequence length", [*MEASURED, "KL", "agreement", "bits/byte"], rows, "Tokens")


def longest(found: dict[str, Any]) -> dict[str, Any]:
    """The models of the longest sequences, for `positions`."""
    return dict(found[max(found, key=int)].get("models", {})) if found else {}


MEASURED = (*((role, "loss, nats/token") for role in MODELS), f"student {cells.MINUS} teacher")


def _measured(title: str, note: str, part: dict[str, Any]) -> dict[str, Any]:
    """One text or length: each model's loss with its interval, the difference, and how close the student is."""
    models = part.get("models", {})
    shown = []
    for role in MODELS:
        model = models.get(role, {})
        interval = (model.get("intervals") or {}).get("loss")
        shown.append(cells.figure(model.get("loss"), interval=interval, ours=role == "student"))
    shown.append(cells.difference(cells.find(part.get("differences"), figure="loss", model="student", other="teacher")))
    student = models.get("student", {})
    shown += [cells.figure(student.get(key), form, ours=True) for key, form in CLOSENESS]
    return cells.row(title, shown, note=note)


CLOSENESS = (("kl", "{:.4f}"), ("agreement", "{:.1%}"), ("bits_per_byte", "{:.4f}"))


def _domain_in_words(domain: dict[str, Any]) -> str:
    kind = {"own": "own text", "other": "other text"}.get(str(domain.get("kind")), str(domain.get("kind") or ""))
    counts = [
        f"{domain[key]:,} {key}" for key in ("documents", "tokens") if cells.is_number(domain.get(key)) and domain[key]
    ]
    return ", ".join([kind, *counts] if kind else counts)


def domain_plot(found: dict[str, Any], directory: Path) -> str | None:
    rows = {
        name: {
            role: (model["loss"], *((model.get("intervals") or {}).get("loss") or (None, None)))
            for role, model in domain.get("models", {}).items()
            if cells.is_number(model.get("loss"))
        }
        for name, domain in found.items()
    }
    rows = {name: series for name, series in rows.items() if series}
    return charts.dots(rows, "loss, nats/token", "domains", directory) if rows else None

"""What a run amounts to: the verdict, the table of the models, the content of report/results.json. No torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.report.record import MODELS, STAGES, RunRecord

# (key in results.json, title, unit, format): the rows of every table, in one order.
FIGURES = (
    ("parameters", "Parameters", "", "{:,.0f}"),
    ("loss", "Loss", "nats/token", "{:.4f}"),
    ("perplexity", "Perplexity", "", "{:,.2f}"),
    ("bits_per_byte", "Bits per byte", "", "{:.4f}"),
    ("kl", "KL to teacher", "nats/token", "{:.4f}"),
    ("agreement", "Agreement with teacher", "top-1", "{:.1%}"),
    ("overlap", "Overlap with teacher", "probability", "{:.1%}"),
    ("calibration_error", "Calibration error", "expected", "{:.4f}"),
    ("tokens_per_second", "Speed", "tokens/s", "{:,.0f}"),
)

# The parts of evaluate/results.json beside the models, and what stands for one that was not measured.
PARTS: dict[str, type] = {
    "differences": list,
    "domains": dict,
    "long_context": dict,
    "tasks": dict,
    "generation": dict,
    "behaviour": dict,
    "efficiency": dict,
    "gates": list,
    "drift": list,
}


@dataclass(frozen=True)
class Verdict:
    """Shares are of 1; losses in nats/token. None: not known, and `sentence` says why."""

    sentence: str
    parameters_kept: float | None = None  # student / teacher
    gap: float | None = None  # loss(pruned) - loss(teacher)
    gap_closed: float | None = None  # (loss(pruned) - loss(student)) / gap
    student_minus_teacher: float | None = None  # loss


def judge(models: dict[str, dict[str, Any]]) -> Verdict:
    """The verdict on evaluated models: {"teacher": {"parameters", "loss", ...}, "pruned": ..., "student": ...}."""
    absent = [role for role in ("teacher", "student") if not usable(models.get(role))]
    if absent:
        verb = "has" if len(absent) == 1 else "have"
        return Verdict(f"No verdict yet: the {' and the '.join(absent)} {verb} not been evaluated.")
    teacher, student = models["teacher"], models["student"]
    kept = student["parameters"] / teacher["parameters"]
    difference = student["loss"] - teacher["loss"]
    against = f"{student['loss']:.3f} nats/token against the teacher's {teacher['loss']:.3f}"
    start = f"The student keeps {kept:.1%} of the teacher's parameters"
    if not usable(models.get("pruned")):
        return Verdict(f"{start} and reaches {against}.", kept, student_minus_teacher=difference)
    gap = models["pruned"]["loss"] - teacher["loss"]
    closed = (models["pruned"]["loss"] - student["loss"]) / gap if gap > 0 else None
    if closed is None:
        sentence = f"{start}; pruning opened no gap to close, and it reaches {against}."
    elif closed < 0:
        sentence = f"{start} but is worse than the pruned model that it started from: {against}."
    elif difference <= 0:
        sentence = f"{start}, closes the whole loss gap that pruning opened and passes the teacher: {against}."
    else:
        sentence = f"{start} and closes {percent(closed)} of the loss gap that pruning opened: {against}."
    return Verdict(sentence, kept, gap, closed, difference)


def pending_in_words(pending: list[str]) -> str:
    """What a partial report does not have yet, and how to add it; empty for a whole one."""
    if not pending:
        return ""
    remedy = f"stage=[{','.join([*pending, 'report'])}] adds them."
    return f"Not finished and so not in this report: {', '.join(pending)}. {remedy}"


def usable(model: dict[str, Any] | None) -> bool:
    """Whether an evaluated model has the figures that a verdict needs."""
    return bool(model) and all(_is_number(model.get(key)) for key in ("parameters", "loss"))  # type: ignore[union-attr]


def percent(share: float) -> str:
    """A share near 1 gets the digit that tells it from 1, and is never rounded up to it: 0.9996 -> "99.9%"."""
    if share >= 0.9:
        return f"{math.floor(share * 1000 + 1e-6) / 10:.1f}%"
    return f"{share * 100:.0f}%"


def table(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: title, unit, and one cell per model ("–" where there is no number)."""
    rows = []
    for key, title, unit, form in FIGURES:
        cells = []
        for role in MODELS:
            value = models.get(role, {}).get(key)
            known = _is_number(value) and not (role == "teacher" and key in ("kl", "agreement", "overlap"))
            cells.append(form.format(value) if known else "–")
        rows.append({"key": key, "title": title, "unit": unit, "cells": cells})
    return rows


def results(record: RunRecord) -> dict[str, Any]:
    """The content of report/results.json."""
    models = {role: record.evaluation.get("models", {}).get(role, {}) for role in MODELS}
    verdict = judge(models)
    return {
        "run": record.name,
        "verdict": verdict.sentence,
        "parameters_kept": verdict.parameters_kept,
        "pruning_gap": verdict.gap,
        "pruning_gap_closed": verdict.gap_closed,
        "student_minus_teacher": verdict.student_minus_teacher,
        "split": record.evaluation.get("split"),
        "tokens": record.evaluation.get("tokens"),
        "bytes": record.evaluation.get("bytes"),
        **{name: record.evaluation.get(name) for name in ("documents", "sequence_length", "document_mask")},
        "unigram_entropy": record.corpus.get("unigram_entropy"),
        "models": {role: model for role, model in models.items() if model},
        **{part: record.evaluation.get(part) or empty() for part, empty in PARTS.items()},
        "quantized": record.quantized,
        "search": told(record.search),
        "pending": record.pending,
        "missing": record.missing | record.evaluation.get("missing", {}),
        "stages": {stage: _stage(record, stage) for stage in STAGES},
        "steps": chain(record),
        "lineage": lineage(record),
    }


def told(search: dict[str, Any]) -> dict[str, Any]:
    """search.json without what it was made from."""
    return {key: value for key, value in search.items() if key != "source"}


def chain(record: RunRecord) -> list[dict[str, Any]]:
    """Of a run in steps one row each: where its start and its teacher lay, parameters, the losses in nats/token of what
    was pruned, on the first batch of training, and of the student, on the validation split; its search. None where a
    step has not come so far."""
    rows = []
    for number, step in enumerate(record.steps, start=1):
        manifests = step.manifests
        prune, distil = (manifests[stage].get("figures", {}) for stage in ("prune", "distil"))
        validation = distil.get("validation") or {}
        rows.append(
            {
                "step": number,
                "start": manifests["prune"].get("inputs", {}).get("teacher", {}).get("path"),
                "teacher": manifests["distil"].get("inputs", {}).get("teacher", {}).get("path"),
                "parameters": prune.get("parameters_after"),
                "share_of_start": prune.get("ratio"),
                "steps": distil.get("steps"),
                "tokens": distil.get("tokens"),
                "first_ce": step.first_loss,
                "ce": validation.get("ce"),
                "kd": validation.get("kd"),
                "search": told(step.search),
            }
        )
    return rows


CHAIN = (  # of the table of steps: key, title, format
    ("step", "Step", "{}"),
    ("start", "Pruned from", "{}"),
    ("teacher", "Teacher", "{}"),
    ("parameters", "Parameters", "{:,}"),
    ("share_of_start", "of its start", "{:.1%}"),
    ("tokens", "Tokens", "{:,}"),
    ("first_ce", "Loss as pruned, first training batch", "{:.4f}"),
    ("ce", "Validation loss, nats/token", "{:.4f}"),
    ("kd", "Divergence from its teacher", "{:.4f}"),
)


def chain_cells(rows: list[dict[str, Any]], run: Path) -> list[list[str]]:
    """The table of steps ("–" where there is nothing yet); places inside of the run's directory from there, others by
    their last two names, so that the losses stay on the page."""
    shown = [row | {key: row[key] and _place(Path(row[key]), run) for key in ("start", "teacher")} for row in rows]
    return [["–" if row[key] is None else form.format(row[key]) for key, _, form in CHAIN] for row in shown]


def _place(path: Path, run: Path) -> str:
    if path.is_relative_to(run):
        return str(path.relative_to(run))
    return str(path) if len(path.parts) <= 2 else f"…/{Path(*path.parts[-2:])}"


def _stage(record: RunRecord, stage: str) -> dict[str, Any]:
    manifest = record.manifests[stage]
    return {
        "complete": record.complete[stage],
        "seconds": manifest.get("seconds"),
        "figures": manifest.get("figures", {}),
    }


def lineage(record: RunRecord) -> list[dict[str, Any]]:
    """One entry per stage that ran: what it read with hashes, code and versions, layout, seed."""
    entries = []
    for stage, inputs in record.inputs().items():
        manifest = record.every_manifest()[stage]
        entry = {"stage": stage, "inputs": inputs}
        entry |= {
            key: manifest[key]
            for key in ("git", "versions", "layout", "seed", "started", "finished")
            if key in manifest
        }
        if stage == "prune":
            entry["kept"] = kept_in_words(record.kept)
        entries.append(entry)
    return entries


def kept_in_words(kept: dict[str, Any]) -> dict[str, str]:
    """kept.json as ranges: {"hidden": "0-3, 7", "layers": "1-4", "ffn of layer 1": ...}."""
    words: dict[str, str] = {}
    for axis in ("layers", "hidden", "groups", "heads", "ffn"):
        indices = kept.get(axis)
        if isinstance(indices, dict):
            title = "KV groups" if axis == "groups" else axis
            words |= {f"{title} of layer {layer}": ranges(values) for layer, values in indices.items()}
        elif indices is not None:
            words[axis] = ranges(indices)
    return words


def ranges(indices: list[int]) -> str:
    """Sorted numbers as ranges: [0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

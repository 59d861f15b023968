"""Gates: that each is one, and names a figure that there can be."""

import difflib
from dataclasses import fields
from pathlib import Path

from pipelines.config import Config, expect
from pipelines.evaluation_settings import MODEL_FIGURES, MODELS, TASK_FILES, EvaluateConfig, is_task_file
from pipelines.gates import EXPORT

FORM = "Write {figure: student.kl, below: 0.2}, or {figure: student.loss, of: teacher, below: 1.05}."


def check(config: Config) -> None:
    """Raises UserError for the first gate that could not be judged whatever is measured."""
    figures = [*MODEL_FIGURES, *(entry.name for entry in fields(EvaluateConfig))]
    for place, gate in enumerate(config.gates):
        setting = f"gates[{place}]"
        start, *rest = gate.figure.split(".")
        owners = [*MODELS, EXPORT]
        remedy = _did_you_mean(start, owners) or FORM
        expect(start in owners, f"{setting}.figure", f"a figure of {', '.join(owners)}", repr(gate.figure), remedy)
        expect(bool(rest and all(rest)), f"{setting}.figure", f"{start}.NAME", repr(gate.figure), FORM)
        bounds = [name for name in ("above", "below") if getattr(gate, name) is not None]
        found = " and ".join(bounds) or "neither"
        expect(
            len(bounds) == 1, setting, "one of above and below", found, "Write a gate for each. " * len(bounds) + FORM
        )
        if start == EXPORT:
            expect(gate.of is None, f"{setting}.of", "none for a figure of export", gate.of, "Leave it out.")
            continue
        remedy = _did_you_mean(rest[0], figures) or f"There are {', '.join(MODEL_FIGURES)}, and the parts of evaluate."
        expect(rest[0] in figures, f"{setting}.figure", f"a figure of {start}", repr(gate.figure), remedy)
        if rest[0] == "domains" and len(rest) > 1:
            measured = [domain.name for domain in config.evaluate.domains]
            remedy = _did_you_mean(rest[1], measured) or "Add it to evaluate.domains, or leave the gate out."
            expected = f"one of evaluate.domains, {', '.join(measured) or 'of which there are none'}"
            expect(rest[1] in measured, f"{setting}.figure", expected, repr(gate.figure), remedy)
        if rest[0] == "tasks" and len(rest) > 1 and (asked := named(config.evaluate.tasks.names)) is not None:
            remedy = _did_you_mean(rest[1], asked) or "Add it to evaluate.tasks.names, or leave the gate out."
            expected = f"one of evaluate.tasks.names, {', '.join(asked) or 'of which there are none'}"
            expect(rest[1] in asked, f"{setting}.figure", expected, repr(gate.figure), remedy)
        if gate.of is not None:
            others = [model for model in MODELS if model != start]
            expect(gate.of in others, f"{setting}.of", " or ".join(others), gate.of, "Name the model to compare with.")


def named(tasks: list[str]) -> list[str] | None:
    """By what names results.json has them; None where a directory of task files is among them, or a path is none."""
    files = [Path(name) for name in tasks if is_task_file(name)]
    if any(path.suffix not in TASK_FILES or path.is_dir() for path in files):
        return None
    return [Path(name).stem if is_task_file(name) else name for name in tasks]


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else ""

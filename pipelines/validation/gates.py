"""Gates: that each is one, and names a figure that there can be."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import Config, expect
from pipelines.evaluation_settings import (
    MODEL_FIGURES,
    MODELS,
    PARTS,
    TASK_FILES,
    TOKEN_CLASSES,
    GateConfig,
    is_task_file,
)
from pipelines.gates import EXPORT

FORM = "Write {figure: student.kl, below: 0.2}, or {figure: student.loss, of: teacher, below: 1.05}."
EXPORTED = ("relative_difference", "largest_difference", "bytes")  # of export, besides "quantized" and "opens"
OF_FORM = ("loss", "bits_per_byte", "kl", "agreement", "kl_to_student", "relative_difference", "bytes", "parameters")
DIVERSITY = ("distinct_1", "distinct_2", "distinct_3", "repetition", "template_rate", "mean_new_tokens", "ended")
OF_A_PART = {  # figures behind the name of a text, a length or a category
    "domains": ("loss", "bits_per_byte", "kl", "agreement"),
    "long_context": ("loss", "kl", "agreement"),
    "by_token_class": ("share", "loss", "kl", "agreement"),
    "behaviour": ("prompts", "refusal_rate", "toxic_rate"),
}
TO_ITSELF = ("kl", "kl_by_entropy")  # 0 of the teacher, which nothing is a share of
Next = tuple[Sequence[str] | None, bool]  # the names that may follow, None: any; whether none need follow


def check(config: Config) -> None:
    """Raises UserError for the first gate that could not be judged whatever is measured."""
    for place, gate in enumerate(config.gates):
        setting = f"gates[{place}]"
        start, *rest = gate.figure.split(".")
        owners = [*MODELS, EXPORT]
        remedy = _did_you_mean(start, owners) or FORM
        expect(start in owners, f"{setting}.figure", f"a figure of {', '.join(owners)}", repr(gate.figure), remedy)
        expect(bool(rest and all(rest)), f"{setting}.figure", f"{start}.NAME", repr(gate.figure), FORM)
        bounds = [name for name in ("above", "below") if getattr(gate, name) is not None]
        found = " and ".join(bounds) or "neither"
        remedy = f"Write a gate for each. {FORM}" if bounds else FORM
        expect(len(bounds) == 1, setting, "one of above and below", found, remedy)
        if start == EXPORT:
            expect(gate.of is None, f"{setting}.of", "none for a figure of export", gate.of, "Leave it out.")
        elif gate.of is not None:
            _check_other(setting, gate, start, rest)
        _check_path(config, f"{setting}.figure", gate.figure)


def _check_other(setting: str, gate: GateConfig, model: str, names: list[str]) -> None:
    others = [name for name in MODELS if name != model]
    expect(gate.of in others, f"{setting}.of", " or ".join(others), gate.of, "Name the model to compare with.")
    told = "another than the teacher, whose divergence from itself is 0"
    itself = gate.of == "teacher" and bool({names[0], names[-1]} & set(TO_ITSELF))
    expect(not itself, f"{setting}.of", told, gate.of, "Leave it out, or name pruned.")


def _check_path(config: Config, setting: str, figure: str) -> None:
    """Every name of a figure, as far as it is known what can follow the one before."""
    start, *names = figure.split(".")
    evaluate = config.evaluate
    asked = {
        "generation.count": evaluate.generation.count,
        "behaviour.prompts": evaluate.behaviour.prompts,
        "efficiency.batch_sizes": evaluate.efficiency.batch_sizes,
    }
    for name, value in asked.items():
        unasked = start != EXPORT and names[0] == name.partition(".")[0] and not value
        remedy = "Set it, or leave the gate out."
        expect(not unasked, setting, f"evaluate.{name}, which measures it", f"none for {figure!r}", remedy)
    follows = _of_export if start == EXPORT else _of_model
    for place, name in enumerate(names):
        before = ".".join([start, *names[:place]])
        known, may_end = follows(config, names[:place])
        if known is None:
            return
        number = f"{before}, which is a number"
        expect(bool(known) or not may_end, setting, number, repr(figure), f"Leave .{'.'.join(names[place:])} out.")
        home = HOMES.get(before.partition(".")[2], "")
        expected = (
            f"one of {home}, {', '.join(known) or 'of which there are none'}" if home else f"a figure of {before}"
        )
        otherwise = f"Add it to {home}, or leave the gate out." if home else f"There are {', '.join(known)}."
        expect(name in known, setting, expected, repr(figure), _did_you_mean(name, known) or otherwise)
    known, may_end = follows(config, names)
    told = f"Name one of {', '.join(known)} behind it." if known else "Name the figure behind it."
    expect(may_end, setting, f"{figure}.NAME", repr(figure), told)


HOMES = {  # where the names of a part come from
    "domains": "evaluate.domains",
    "long_context": "evaluate.long_context",
    "tasks": "evaluate.tasks.names",
    "quantized": "export.quantize",
}


def _of_model(config: Config, names: Sequence[str]) -> Next:
    """What follows these names behind a model's."""
    evaluate = config.evaluate
    if not names:
        return (*MODEL_FIGURES, *PARTS), False
    part, *inner = names
    if part not in (*PARTS, "by_token_class", "kl_by_entropy"):
        return (), True
    if part == "tasks":
        return (named(evaluate.tasks.names), False) if not inner else (None, True)
    if part == "efficiency":
        return (("bytes_on_disk", "peak_bytes", "parameters"), False) if not inner else ((), True)
    if part == "generation":
        return [(("diversity",), False), (DIVERSITY, False), ((), True)][min(len(inner), 2)]
    if part == "kl_by_entropy":
        return None, bool(inner)
    if len(inner) == 1:
        return OF_A_PART[part], False
    if inner:
        return (), True
    if part == "by_token_class":
        return TOKEN_CLASSES, False
    given = {"domains": [d.name for d in evaluate.domains], "long_context": [str(n) for n in evaluate.long_context]}
    return given.get(part), False


def _of_export(config: Config, names: Sequence[str]) -> Next:
    if not names:
        return (*EXPORTED, "quantized", "opens"), False
    part, *inner = names
    if part == "quantized":
        methods = [method.value for method in config.export.quantize]
        forms = [*methods, *(f"teacher-{method}" for method in methods if config.export.quantize_teacher)]
        return [(forms, False), (OF_FORM, False), ((), True)][min(len(inner), 2)]
    return (None, len(inner) > 1) if part == "opens" else ((), True)


def named(tasks: list[str]) -> list[str] | None:
    """By what names results.json has them; None where a directory of task files is among them, or a path is none."""
    files = [Path(name) for name in tasks if is_task_file(name)]
    if any(path.suffix not in TASK_FILES or path.is_dir() for path in files):
        return None
    return [Path(name).stem if is_task_file(name) else name for name in tasks]


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else ""

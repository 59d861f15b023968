"""Thresholds that a run must meet, held to what its stages have measured. Imports no torch.

A gate belongs to the stage that finds its figure: evaluate, or export for figures that begin with "export". It is
judged when that stage ends, and again whenever the stage is asked for and finished already: another bound asks for no
new measurement. What came of it lies in <stage>/gates.json, which is no part of the stage's content.
"""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from pipelines import artifacts, console
from pipelines.config import Config, UserError
from pipelines.evaluation_settings import GateConfig
from pipelines.files import read_object, write_json

FILE = "gates.json"
EXPORT = "export"
FORMS = "quantized"  # of export's figures: those of quantized.json by the forms' names
NOT_FIGURES = (FILE, "manifest.json")  # of what lies in export's directory
SHOWN = 8  # names told where a figure is not there


def stage_of(gate: GateConfig) -> str:
    return EXPORT if gate.figure.split(".")[0] == EXPORT else "evaluate"


def check(config: Config, stage: str) -> None:
    """Judge the gates of a stage that has finished, say what came of each, and write it down.

    In one process. Raises UserError with one line where a gate fails.
    """
    mine = [gate for gate in config.gates if stage_of(gate) == stage]
    directory = artifacts.stage_directory(config, stage)
    path = directory / FILE
    if not mine:
        return path.unlink(missing_ok=True)
    judged = judge(mine, measured(directory, stage))
    write_json(path, judged)
    for gate in judged:
        console.say(f"{stage}  gate {'passed' if gate['passed'] else 'FAILED'}: {gate['why']}")
    failed = [gate for gate in judged if not gate["passed"]]
    if failed:
        told = "; ".join(in_short(gate) for gate in failed)
        unknown = all(gate["value"] is None for gate in failed)
        remedy = (
            "Measure what they name, or set gates" if unknown else "Train longer or change the student, or set gates"
        )
        raise UserError(
            f"{stage}: {len(failed)} of {len(judged)} gates failed: {told}. What was measured is kept in {directory}, "
            f"and stage=report shows it. {remedy}."
        )


def in_short(gate: dict[str, Any]) -> str:
    """Why a gate that `judge` has judged failed, without the reason of a gap, which stands in "why"."""
    return gate["why"] if gate["value"] is not None else f"{gate['figure']} was not measured"


def read(directory: Path) -> list[dict[str, Any]]:
    """What was judged of a run's evaluate and export. directory: <run.directory>/<run.name>."""
    files = (directory / stage / FILE for stage in ("evaluate", EXPORT))
    return [gate for path in files if path.is_file() for gate in json.loads(path.read_text())]


def measured(directory: Path, stage: str) -> dict[str, Any]:
    """What a gate's figure is looked up in."""
    if stage != EXPORT:
        return read_object(directory / "results.json", "Run stage=evaluate again.")
    others = {path.stem: read_object(path) for path in sorted(directory.glob("*.json")) if path.name not in NOT_FIGURES}
    forms = others.get(FORMS, {}).get("variants", [])
    return artifacts.read_manifest(directory).get("figures", {}) | others | {FORMS: {row["name"]: row for row in forms}}


def judge(gates: list[GateConfig], results: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"figure", "bound", "above" | "below": the bound, "value" (null for a gap), "passed", "why"}]."""
    return [_judge(gate, results) for gate in gates]


def _judge(gate: GateConfig, results: dict[str, Any]) -> dict[str, Any]:
    side, bound = ("above", gate.above) if gate.above is not None else ("below", gate.below)
    assert bound is not None
    name = f"{gate.figure} / {gate.of}'s" if gate.of else gate.figure
    try:
        value = find(results, gate.figure)
        if gate.of:
            value = _ratio(value, find(results, _figure_of(gate.figure, gate.of)), gate)
    except LookupError as gap:
        value, passed, why = None, False, f"{name} {side} {bound:g}: {gap.args[0]}"
    else:
        passed = value > bound if side == "above" else value < bound
        why = f"{name} is {value:.4g}, expected {side} {bound:g}"
    return {"figure": name, "bound": bound, side: bound, "value": value, "passed": passed, "why": why}


def _figure_of(figure: str, model: str) -> str:
    return ".".join([model, *figure.split(".")[1:]])


def _ratio(value: float, other: float, gate: GateConfig) -> float:
    if other == 0:
        raise LookupError(f"the {gate.of}'s is 0, and nothing can be told as a share of it")
    return value / other


def find(results: dict[str, Any], figure: str) -> float:
    """The number that a gate's figure names. Raises LookupError with the reason where there is none.

    student.kl is results["models"]["student"]["kl"]. What is not there is looked for in the other parts, in which the
    model's own entry may stand at any depth: student.domains.law.kl is results["domains"]["law"]["models"]["student"]
    ["kl"], student.tasks.arc_easy is results["tasks"]["models"]["student"]["arc_easy"]["value"].
    """
    model, *names = figure.split(".")
    if model == EXPORT:
        return _number(_walk(results, names, None, figure), figure)
    own = results.get("models", {}).get(model, {})
    absent = results.get("missing", {}).get(model, "")
    if not own and names[0] not in results:
        raise LookupError(absent or f"there is no {model} in what was measured")
    if reason := _missing(results, names):
        raise LookupError(reason)
    inside = names[0] in own or names[0] not in results  # in neither: the model's own names are those to be told
    return _number(_walk(own if inside else results, names, model, figure, absent), figure)


def _walk(node: Any, names: list[str], model: str | None, figure: str, absent: str = "") -> Any:
    """absent: why the model is missing, or empty: the reason where a part has no entry of it."""
    for place, name in enumerate(names):
        if isinstance(node, dict) and name not in node and model in node.get("models", {}):
            gap = _missing(node, names[place:])
            node, absent = node["models"][model], ""
        else:
            gap = _missing(node, names[place:])
        if not isinstance(node, dict) or name not in node:
            raise LookupError(gap or absent or _unknown(node, name, figure))
        node = node[name]
    if isinstance(node, dict) and model in node.get("models", {}):
        node = node["models"][model]
    return node["value"] if isinstance(node, dict) and "value" in node else node


def _missing(node: Any, names: list[str]) -> str:
    """The reason that stands for a part of a path, "tasks" or "domains.law", or empty."""
    reasons = node.get("missing", {}) if isinstance(node, dict) else {}
    paths = (".".join(names[:count]) for count in range(len(names), 0, -1))
    return next((f"not measured: {reasons[path]}" for path in paths if path in reasons), "")


def _unknown(node: Any, name: str, figure: str) -> str:
    known = [key for key, value in node.items() if not isinstance(value, str)] if isinstance(node, dict) else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    shown = ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
    hint = f"Did you mean {close[0]}?" if close else f"There are {shown}" if known else "There is nothing below it"
    return f"there is no {name} in {figure}. {hint}"


def _number(value: Any, figure: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, dict):
            raise LookupError(f"{figure} is no number. Name one of {', '.join(list(value)[:SHOWN])} behind it")
        raise LookupError(f"{figure} was not measured" if value is None else f"{figure} is no number")
    if not math.isfinite(value):
        raise LookupError(f"{figure} is {value}")
    return float(value)

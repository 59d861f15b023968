"""What stands above the figures: gates that passed or failed, what drifted since the stored baseline, and the models'
table with intervals and noise. No torch."""

from typing import Any

from pipelines.report import cells, summary
from pipelines.report.record import MODELS

BASES = {"kl", "agreement", "overlap"}  # of the teacher with itself: nothing to show


def gates_in_words(gates: list[dict[str, Any]]) -> str:
    """ "2 of 3 gates passed. Failed: student.kl is 0.12, expected below 0.10." Empty without gates."""
    if not gates:
        return ""
    failed = [gate for gate in gates if not gate.get("passed")]
    if not failed:
        return f"All {len(gates)} gates passed." if len(gates) > 1 else "Its gate passed."
    passed = len(gates) - len(failed)
    start = f"{passed} of {len(gates)} gates passed" if passed else f"None of {len(gates)} gates passed"
    return f"{start}. Failed: {'; '.join(_failed(gate) for gate in failed)}."


def _failed(gate: dict[str, Any]) -> str:
    side, bound = bound_of(gate)
    if not cells.is_number(gate.get("value")):
        return f"{gate['figure']} was not measured"
    return f"{gate['figure']} is {_short(gate['value'])}, expected {side} {_short(bound)}"


def bound_of(gate: dict[str, Any]) -> tuple[str, Any]:
    """("above" or "below", the bound)."""
    return ("above" if "above" in gate else "below"), gate["bound"]


def gates(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    rows = []
    for gate in found:
        side, bound = bound_of(gate)
        verdict = cells.cell("\N{CHECK MARK} passed" if gate.get("passed") else "\N{BALLOT X} failed")
        expected = cells.cell(f"{side} {_short(bound)}")
        shown = cells.cell(_short(gate.get("value")))
        rows.append(cells.row(str(gate["figure"]), [verdict, shown, expected], note=_gap(gate)))
        rows[-1]["failed"] = not gate.get("passed")
    return cells.table("The gates of this experiment", ("", "measured", "expected"), rows, "Gate")


def _gap(gate: dict[str, Any]) -> str:
    """Why a gate has no figure."""
    return "" if cells.is_number(gate.get("value")) else str(gate.get("why") or "")


def drift(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    rows = []
    for entry in found:
        values = [cells.cell(_short(entry.get(key))) for key in ("before", "now")]
        interval = cells.between((entry.get("low"), entry.get("high")), "{:+.2g}")
        change = cells.cell(_short(entry.get("difference"), signed=True), interval, mark=cells.noise(entry))
        rows.append(cells.row(str(entry["figure"]), [*values, change]))
    return cells.table("This evaluation against the stored baseline", ("baseline", "now", "change"), rows, "Figure")


def _short(value: Any, *, signed: bool = False) -> str:
    """Four digits that count: 0.04123, 35,377."""
    if not cells.is_number(value):
        return cells.NONE if value is None else str(value)
    form = ("{:+,.0f}" if signed else "{:,.0f}") if abs(value) >= 1e4 else ("{:+.4g}" if signed else "{:.4g}")
    return form.format(value).replace("-", cells.MINUS)


def models(results: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of teacher, pruned and student with their intervals, and the student's difference to the teacher."""
    found, differences = results["models"], results["differences"]
    if not found:
        return None
    rows = []
    for key, title, unit, form in summary.FIGURES:
        shown = []
        for role in MODELS:
            model = found.get(role, {})
            value = None if role == "teacher" and key in BASES else model.get(key)
            interval = (model.get("intervals") or {}).get(key)
            shown.append(cells.figure(value, form, interval, ours=role == "student"))
        entry = cells.find(differences, figure=key, model="student", other="teacher")
        rows.append(cells.row(title, [*shown, cells.difference(entry, form)], unit))
    return cells.table("Teacher, pruned and student", (*MODELS, f"student {cells.MINUS} teacher"), rows, "Figure")

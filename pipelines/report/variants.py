"""Every variant of a run in one form: teacher, pruned, distilled, quantized, candidates, steps. No torch."""

import math
from pathlib import Path
from typing import Any

from pipelines.evaluation_settings import WINDOWS
from pipelines.report import cells
from pipelines.report.efficiency import engine_of, order
from pipelines.report.record import MODELS, RunRecord
from pipelines.safetensors_header import weight_bytes

TEST, ELSEWHERE = "test", "elsewhere"  # where a loss was measured: on the evaluated split, or on other text
DECODE, FORWARD = "decode", "forward pass"  # what tokens_per_second is of
MEASURED_ON = (*WINDOWS, "tokens", "documents")  # what tells whether losses are of the same text


def rows(record: RunRecord, results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per variant whose loss is known: run, name, kind, parameters, bytes (of the weights on disk; reckoned
    from the student's where a candidate or a step was not kept), loss (nats/token) with interval, measured (TEST or
    ELSEWHERE), left_out (why it is ELSEWHERE, where it could be TEST), kl, agreement, tokens_per_second and speed (what
    it is of); None where not known."""
    found = [_model(record, results, role) for role in MODELS if role in results["models"]]
    reason = other_windows(results)
    where = {"measured": ELSEWHERE if reason else TEST, "left_out": reason}
    found += [_quantized(record, entry) | where for entry in results["quantized"].get("variants", [])]
    student = next((row for row in found if row["kind"] == "student"), None)
    per_parameter = student["bytes"] / student["parameters"] if student and student["bytes"] else None
    for row in [*_steps(record, results), *_candidates(record)]:
        row["bytes"] = per_parameter and row["parameters"] and per_parameter * row["parameters"]
        found.append(row)
    return [row for row in found if cells.is_number(row["loss"])]


def _row(record: RunRecord, name: str, kind: str, **known: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("parameters", "bytes", "loss", "interval", "kl", "agreement", "tokens_per_second", "speed"))
    return {"run": record.name, "name": name, "kind": kind, "measured": TEST, "left_out": ""} | empty | known


def other_windows(results: dict[str, Any]) -> str:
    """Why the losses of quantized forms say nothing beside those of the evaluated models: the export has measured them
    on other windows. Empty where it has not, and where nothing was evaluated."""
    found = results["quantized"]
    both = [name for name in MEASURED_ON if found.get(name) is not None and results.get(name) is not None]
    if not results["models"] or not any(found[name] != results[name] for name in both):
        return ""
    different = [name for name in both if found[name] != results[name]]
    told = [", ".join(f"{name} {_plain(facts[name])}" for name in different) for facts in (found, results)]
    return (
        f"export measured them with {told[0]}, evaluate its models with {told[1]}. Run stage=export overwrite=true "
        "with the evaluate.* settings of the evaluation to compare them"
    )


def _plain(value: Any) -> str:
    return f"{value:,}" if cells.is_number(value) else str(value).lower()


def _model(record: RunRecord, results: dict[str, Any], role: str) -> dict[str, Any]:
    model = results["models"][role]
    efficiency = results["efficiency"]
    size = (efficiency.get("models") or {}).get(role, {}).get("bytes_on_disk")
    decode = _decode(efficiency, role)
    speed = model.get("tokens_per_second") if decode is None else decode
    return _row(
        record,
        role,
        role,
        **{key: model.get(key) for key in ("parameters", "loss", "kl", "agreement")},
        interval=(model.get("intervals") or {}).get("loss"),
        bytes=_bytes(model.get("path")) if size is None else size,
        tokens_per_second=speed,
        speed=None if speed is None else FORWARD if decode is None else DECODE,
    )


def _decode(efficiency: dict[str, Any], model: str) -> float | None:
    """At the smallest batch and lengths, at which every model was measured, by one engine for all of them."""
    rows = sorted(efficiency.get("rows") or [], key=order)
    known = [row for row in rows if row["model"] == model and engine_of(row) == engine_of(rows[0])]
    value = known[0].get("decode_tokens_per_second") if known else None
    return float(value) if cells.is_number(value) else None


def _quantized(record: RunRecord, entry: dict[str, Any]) -> dict[str, Any]:
    speed = entry.get("decode_tokens_per_second")
    known = {key: entry.get(key) for key in ("parameters", "bytes", "loss", "kl", "agreement")}
    interval = (entry.get("intervals") or {}).get("loss")
    return _row(
        record, str(entry["name"]), "quantized", **known, interval=interval, tokens_per_second=speed,
        speed=None if speed is None else DECODE,
    )  # fmt: skip


def _steps(record: RunRecord, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Those before the last, which is the student."""
    return [
        _row(record, f"step {row['step']}", "step", parameters=row["parameters"], loss=row["ce"], measured=ELSEWHERE)
        for row in results["steps"][:-1]
    ]


def _candidates(record: RunRecord) -> list[dict[str, Any]]:
    made = []
    for row in candidates(record.search):
        after = row["validation"] if row["distilled"] is None else row["distilled"]
        loss = row["measured"] if after is None else after
        made.append(_row(record, row["name"], "candidate", parameters=row["parameters"], loss=loss, measured=ELSEWHERE))
    return made


def candidates(search: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that the last search of search.json compared in the order of what is known of them, the winner first:
    name, won, followed, parameters, predicted, measured, validation, distilled (losses, nats/token), task,
    tokens_per_second; None where not known."""
    found, known = [], search.get("candidates", {})
    for name in (name for name in search.get("measured", []) if name in known):
        entry = known[name]
        distilled = (entry.get("distilled") or {}).get("ce")
        row = {key: entry.get(key) for key in ("parameters", "predicted", "measured", "validation", "task")}
        row |= {"distilled": distilled, "tokens_per_second": entry.get("tokens_per_second")}
        followed = distilled is not None or row["validation"] is not None
        found.append({"name": name, "won": name == search.get("winner"), "followed": followed} | row)

    def order(row: dict[str, Any]) -> tuple[bool, bool, float]:
        after = row["validation"] if row["distilled"] is None else row["distilled"]
        return not row["won"], not row["followed"], row["measured"] if after is None else after

    return sorted(found, key=order)


def _bytes(directory: str | None) -> int | None:
    """Of the weights in a Hugging Face directory; None where there are none any more."""
    if not directory or not Path(directory, "config.json").is_file():
        return None
    return weight_bytes(Path(directory)) or None


def differences(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The paired differences of a run: of its models, and of each quantized form from what it was made of."""
    of_forms = [entry for form in results["quantized"].get("variants", []) for entry in form.get("differences") or []]
    return [*results["differences"], *of_forms]


def beyond_noise(one: dict[str, Any], other: dict[str, Any], differences: dict[str, Any]) -> bool | None:
    """Whether two rows' losses differ by more than noise; None where that is not known.

    differences: {run: "differences" of its results.json}. By the paired difference where one was measured. Else where
    they lie further apart than two halves of intervals together, as the root of the sum of their squares: of their
    paired differences from a third model where both have one, or of their own losses. On the same text both ask too
    much rather than too little, the second by far.
    """
    # The teacher is every run's.
    run = other["run"] if one["kind"] == "teacher" else one["run"]
    if one["run"] == other["run"] or "teacher" in (one["kind"], other["kind"]):
        paired = {
            frozenset((entry["model"], entry["other"])): entry
            for entry in differences.get(run) or []
            if entry["figure"] == "loss"
        }
        direct = paired.get(frozenset((one["name"], other["name"])))
        if direct:
            return bool(direct["larger_than_noise"])
        for third in sorted({name for pair in paired for name in pair} - {one["name"], other["name"]}):
            both = [paired.get(frozenset((row["name"], third))) for row in (one, other)]
            if all(both):
                return _apart(one, other, [(entry["low"], entry["high"]) for entry in both if entry])
    if not one["interval"] or not other["interval"]:
        return None
    return _apart(one, other, [one["interval"], other["interval"]])


def _apart(one: dict[str, Any], other: dict[str, Any], intervals: list[Any]) -> bool:
    return abs(one["loss"] - other["loss"]) > math.hypot(*((high - low) / 2 for low, high in intervals))

"""Time, memory and size of the models beside each other, as the page shows them. No torch."""

from typing import Any

from pipelines.report import cells
from pipelines.report.record import MODELS

Part = dict[str, Any] | None
COLUMNS = (
    ("time_to_first_token_ms", "first token", "ms", "{:,.1f}"),
    ("prefill_tokens_per_second", "prefill", "tokens/s", "{:,.0f}"),
    ("decode_tokens_per_second", "decode", "tokens/s", "{:,.1f}"),
)
PERCENTILES = ("p50", "p90", "p99")
ENGINES = {"vllm": "vLLM"}  # in words; a row that names none is of transformers


def in_words(found: dict[str, Any]) -> str:
    """ "On cpu, 2 threads, fp32, transformers." """
    threads = found.get("threads")
    words = [str(found[key]) for key in ("device", "dtype", "form") if found.get(key)]
    if threads:
        words.insert(1, f"{threads} thread" + ("" if threads == 1 else "s"))
    return f"Measured on {', '.join(words)}. Ratios are to the teacher in the same setting." if words else ""


def engine_of(row: dict[str, Any]) -> str:
    return row.get("engine") or "transformers"


def setting(row: dict[str, Any]) -> str:
    """ "batch 8, 64 + 32 tokens", and behind it the engine where that is not transformers."""
    engine = engine_of(row)
    words = f"batch {row.get('batch')}, {row.get('prompt_tokens')} + {row.get('new_tokens')} tokens"
    return words if engine == "transformers" else f"{words}, {ENGINES.get(engine, engine)}"


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    place = MODELS.index(row["model"]) if row["model"] in MODELS else len(MODELS)
    return engine_of(row), row.get("batch") or 0, row.get("prompt_tokens") or 0, row.get("new_tokens") or 0, place


def decode_ratio(found: dict[str, Any]) -> float | None:
    """The student's tokens/s after the first token, to the teacher's, at the smallest batch and lengths."""
    rows = [row for row in sorted(found.get("rows") or [], key=order) if row["model"] == "student"]
    ratio = (rows[0].get("ratio") or {}).get("decode_tokens_per_second") if rows else None
    return float(ratio) if cells.is_number(ratio) else None


def speeds(found: dict[str, Any]) -> Part:
    rows = []
    for entry in sorted(found.get("rows") or [], key=order):
        ours, ratio = entry["model"] == "student", entry.get("ratio") or {}
        shown = []
        for key, _, _, form in COLUMNS:
            value = cells.figure(entry.get(key), form, ours=ours)
            shown.append(value | {"note": _times(ratio.get(key)) if entry["model"] != "teacher" else ""})
        latency = entry.get("latency_ms") or {}
        shown += [cells.figure(latency.get(name), "{:,.1f}", ours=ours) for name in PERCENTILES]
        rows.append(cells.row(entry["model"], shown, note=setting(entry), ours=ours))
    head = [(title, unit) for _, title, unit, _ in COLUMNS] + [(name, "between tokens, ms") for name in PERCENTILES]
    return cells.table("Speed by batch and length", head, rows, "Model")


def _times(ratio: Any) -> str:
    return f"{ratio:.2f}×" if cells.is_number(ratio) else ""


def sizes(found: dict[str, Any]) -> Part:
    models = found.get("models") or {}
    teacher = models.get("teacher") or {}
    rows = []
    for role in [role for role in MODELS if role in models] + [name for name in models if name not in MODELS]:
        model, shown = models[role], []
        for key in ("bytes_on_disk", "peak_bytes", "parameters"):
            text = f"{model[key]:,}" if key == "parameters" and model.get(key) else cells.bytes_in_words(model.get(key))
            known = role != "teacher" and cells.is_number(model.get(key)) and teacher.get(key)
            shown.append(cells.cell(text, _times(model[key] / teacher[key]) if known else "", ours=role == "student"))
        rows.append(cells.row(role, shown, ours=role == "student"))
    return cells.table("Size and memory", ("on disk", "peak memory", "parameters"), rows, "Model")

"""What was planned for a distillation beside what it took: memory of a device, speed, disk of a checkpoint. No torch.

Figures of this start of the stage: one that continues tells of its own part. Speed is the median over training steps,
so that validations, checkpoints and the first steps do not count.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from pipelines import gpus, planning
from pipelines.config import Config, Layout, Precision
from pipelines.families import ModelShape
from pipelines.storage import distillation_checkpoint_bytes

ON_GPU = "peak of torch's allocator on the fullest GPU"
ON_CPU = "resident memory of the fullest process beyond what it had before the models, libraries' own included"
NO_PEAK = "no peak of this device is known in this precision"


def compare(
    config: Config,
    ranks: Layout,
    teacher: ModelShape,
    student: ModelShape,
    directory: Path,
    *,
    held_bytes: int,
    device_name: str,
) -> list[dict[str, Any]]:
    """[{"what", "unit": "bytes" or "tokens/s", "planned", "measured": None where it is not known, "note"}].

    directory: the stage's, with metrics.jsonl and checkpoints/. held_bytes: of the fullest device. device_name: as
    torch gives it.
    """
    settings = config.distil
    memory = planning.step_bytes(settings, teacher, student, ranks)["total"]
    flops = planning.step_flops(settings, teacher, student).total
    known = ranks.device == "cuda" and settings.precision is Precision.bf16
    peak = gpus.peak_flops(device_name) if known else None
    speed = None if peak is None else config.plan.share_of_peak * peak * ranks.processes / flops
    share = NO_PEAK if peak is None else f"at {config.plan.share_of_peak:.0%} of the peak of {ranks.processes} devices"
    checkpoint = distillation_checkpoint_bytes(settings, teacher, student)
    return [
        _entry("memory of a device", "bytes", memory, held_bytes, ON_GPU if ranks.device == "cuda" else ON_CPU),
        _entry("training speed", "tokens/s", speed, training_speed(directory / "metrics.jsonl"), share),
        _entry("a checkpoint", "bytes", checkpoint, newest_checkpoint(directory), "on disk"),
    ]


def _entry(what: str, unit: str, planned: float | None, measured: float | None, note: str) -> dict[str, Any]:
    rounded = (None if value is None else round(value) for value in (planned, measured))
    return {"what": what, "unit": unit, **dict(zip(("planned", "measured"), rounded, strict=True)), "note": note}


def training_speed(metrics: Path) -> float | None:
    """Median tokens/s of the rows of training; None without any."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    speeds = [row["tokens_per_second"] for row in rows if row.get("split") == "train" and "tokens_per_second" in row]
    return median(speeds) if speeds else None


def newest_checkpoint(directory: Path) -> int | None:
    """Bytes of its files; None without one."""
    found = sorted((directory / "checkpoints").glob("step-*"))
    return sum(file.stat().st_size for file in found[-1].rglob("*") if file.is_file()) if found else None


def in_words(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    """(what, planned, measured, measured in percent of the plan)."""
    sides = [_value(entry[side], entry["unit"]) for side in ("planned", "measured")]
    share = f"{entry['measured'] / entry['planned']:.0%}" if entry["planned"] and entry["measured"] else ""
    return entry["what"], sides[0], sides[1], share


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "not known"
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def as_text(entries: list[dict[str, Any]], description: str) -> str:
    lines = [f"{description}  {'':<20}{'planned':>18}{'measured':>18}"]
    for entry in entries:
        what, planned, measured, share = in_words(entry)
        lines.append(f"{description}  {what:<20}{planned:>18}{measured:>18}  {share:>5}  {entry['note']}")
    return "\n".join(lines)

"""What the training and pruning stages left, drawn for the page. No torch."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipelines import plan_check
from pipelines.report import cells, plots
from pipelines.report.record import AxisImportance, RunRecord

Plot = dict[str, Any]


def plot(svg: str | None, title: str, caption: str) -> dict[str, Any] | None:
    # Markup: matplotlib has escaped the text of the SVG itself.
    return {"svg": Markup(svg), "title": title, "caption": caption} if svg else None


def present(*entries: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry]


def distil_plots(record: RunRecord, directory: Path) -> list[dict[str, Any]]:
    metrics = record.distil_metrics
    return present(
        plot(
            plots.curves(metrics, "ce", "cross-entropy, nats/token", "distil_loss", directory),
            "Student's loss",
            "Cross-entropy with the text while it learns from the teacher.",
        ),
        plot(
            plots.curves(metrics, "kd", "KL, nats/token", "distil_kl", directory),
            "KL to the teacher",
            "KL(teacher || student), the divergence that distillation lowers.",
        ),
        plot(
            plots.validations(metrics, _bands(record), "divergence, nats/token", "distil_entropy", directory),
            "Divergence by the teacher's entropy",
            "Tokens by the teacher's entropy in nats: near 0 it is sure of what comes.",
        ),
        plot(
            plots.validations(
                metrics, {"agreement": "agreement", "overlap": "overlap"}, "share", "distil_overlap", directory
            ),
            "Agreement and overlap",
            "How often both hold the same token most likely, and the probability that their distributions share.",
        ),
        plot(
            plots.validations(
                metrics,
                {f"{model}_calibration_error": model for model in ("student", "teacher")},
                "expected calibration error",
                "distil_calibration",
                directory,
            ),
            "Calibration",
            "How far confidence lies from being right, over 15 bins of confidence; 0 is best.",
        ),
    )


def planned(record: RunRecord) -> dict[str, Any] | None:
    """What was planned for the distillation beside what it took."""
    entries = record.manifests["distil"].get("figures", {}).get("plan", [])
    rows = []
    for entry in entries:
        title, *shown = plan_check.in_words(entry)
        rows.append(cells.row(title, [cells.cell(text) for text in shown], note=entry["note"]))
    return cells.table("Planned and measured", ("planned", "measured", "of the plan"), rows, "Figure")


def _bands(record: RunRecord) -> dict[str, str]:
    """The keys of the bands of the teacher's entropy, in the order of their bounds, with their names."""
    prefix = "kd_entropy_"
    keys = {key for row in record.distil_metrics.rows for key in row if key.startswith(prefix)}
    bounds = {key: key.removeprefix(prefix).split("_") for key in keys}
    return {
        key: f"from {low}" if high == "up" else f"{low} to {high}"
        for key, (low, high) in sorted(bounds.items(), key=lambda item: float(item[1][0]))
    }


def teacher_plots(record: RunRecord, directory: Path) -> list[dict[str, Any]]:
    entropy = record.corpus.get("unigram_entropy")
    references = [("single-token entropy", entropy)] if entropy else []
    metrics = record.teacher_metrics
    key = "ce" if metrics.series("train", "ce") or metrics.series("validation", "ce") else "loss"
    return present(
        plot(
            plots.curves(metrics, key, "cross-entropy, nats/token", "teacher_loss", directory, references),
            "Teacher's loss",
            "Training on the corpus. A teacher worth learning from lies well below the entropy of single tokens.",
        )
    )


def importance_plots(record: RunRecord, directory: Path) -> list[dict[str, Any]]:
    captions = {
        "hidden": "One set for the whole model, in the order of the scores.",
        "ffn": "In each layer: the 5th to 95th percentile of kept and of dropped neurons, a dot at the median.",
        "kv_groups": "One dot per KV group; a group goes with its heads.",
        "heads": "One dot per query head; heads are ranked within their KV group.",
        "layers": "1 minus the cosine between a layer's input and its output.",
        "removals": "Measured on the teacher at its full width, before anything was cut.",
    }

    def counted(axis: AxisImportance) -> str:
        return "" if axis.unit == "blocks" else f"{axis.kept_units:,} of {axis.units:,} kept. "

    return present(
        *(
            plot(
                plots.importance(axis, f"importance_{axis.name}", directory),
                axis.title,
                counted(axis) + captions[axis.name],
            )
            for axis in record.importance
        )
    )

"""What the evaluation measured, as the parts of the page: tables, plots and words; and the gaps with their reasons.
No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation_settings import few_in_words
from pipelines.report import cells, charts, decide, efficiency, judgement, quality, tasks, variants
from pipelines.report.record import MODELS, RunRecord
from pipelines.report.training import plot, present


def evaluated(results: dict[str, Any], directory: Path) -> dict[str, Any]:
    """By the names of page.html.jinja; PNG files of the plots go to the directory."""
    models = results["models"]
    return {
        "gates_words": judgement.gates_in_words(results["gates"]),
        "gates_passed": all(gate.get("passed") for gate in results["gates"]),
        "gates": judgement.gates(results["gates"]),
        "drift": judgement.drift(results["drift"]),
        "models_table": judgement.models(results),
        "intervals": _intervals_in_words(results),
        "token_classes": quality.token_classes(models),
        "entropy_bands": quality.entropy_bands(models),
        "quality_plots": _quality_plots(models, directory),
        "domains": quality.domains(results["domains"]),
        "domain_plots": present(
            plot(
                quality.domain_plot(results["domains"], directory),
                "Loss by domain",
                "The student's distance to the teacher on each text; bars are intervals.",
            )
        ),
        "long_context": quality.long_context(results["long_context"]),
        "long_plots": _long_plots(results["long_context"], directory),
        "tasks": tasks.table(results["tasks"]),
        "tasks_words": _tasks_in_words(results["tasks"]),
        "task_plots": present(
            plot(
                tasks.plot(results["tasks"], directory),
                "Scores on tasks",
                "Bars are 95% intervals of the standard error; hollow marks are what was published.",
            )
        ),
        "samples": tasks.samples(results["generation"]),
        "samples_words": _settings_in_words(results["generation"].get("settings")),
        "diversity": tasks.diversity(results["generation"]),
        "behaviour": tasks.behaviour(results["behaviour"]),
        "answers": tasks.answers(results["behaviour"]),
        "efficiency_words": efficiency.in_words(results["efficiency"]),
        "speeds": efficiency.speeds(results["efficiency"]),
        "sizes": efficiency.sizes(results["efficiency"]),
        "quantized": quantized(results),
        "quantized_words": _quantized_in_words(results),
        "gaps": gaps(results),
    }


def _quality_plots(models: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    reliability = plot(
        quality.reliability(models, directory),
        "Reliability",
        "How often a model is right where it is so sure; on the diagonal it is as right as it is sure. "
        "A dot's area is its share of the tokens.",
    )
    captions = (
        "What a longer context is worth to each model: further down is better.",
        "Whether the student leaves the teacher as the context grows.",
    )
    return present(reliability, *_by_position(models, "position", "", captions, directory))


def _long_plots(found: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    captions = (
        "Where a line turns up, the model has no use for text so far away.",
        "Whether the student leaves the teacher beyond the length that it was trained on.",
    )
    return present(*_by_position(quality.longest(found), "long", " in the longest sequences", captions, directory))


def _by_position(
    models: dict[str, Any], name: str, where: str, captions: tuple[str, str], directory: Path
) -> list[dict[str, Any] | None]:
    """Loss and KL by the place in the sequence; None for what was not measured."""
    figures = (("loss", "Loss", "loss, nats/token"), ("kl", "KL", "KL to the teacher, nats/token"))
    return [
        plot(
            quality.positions(models, figure, label, f"{name}_{figure}", directory),
            f"{title} by position{where}",
            caption,
        )
        for (figure, title, label), caption in zip(figures, captions, strict=True)
    ]


def _intervals_in_words(results: dict[str, Any]) -> str:
    if not any(model.get("intervals") for model in results["models"].values()):
        return ""
    few = few_in_words(results["documents"]) if isinstance(results["documents"], int) else ""
    return "Small figures are 95% intervals by bootstrap over documents." + (f" Mind: {few}." if few else "")


def _tasks_in_words(found: dict[str, Any]) -> str:
    version = found.get("harness")
    return f"Measured by lm-evaluation-harness {version}." if version else ""


def _settings_in_words(settings: Any) -> str:
    if not isinstance(settings, dict):
        return ""
    plain = {key: value for key, value in settings.items() if isinstance(value, int | float | str | bool)}
    return ", ".join(_setting(key.replace("_", " "), value) for key, value in plain.items())


def _setting(name: str, value: int | float | str | bool) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def quantized(results: dict[str, Any]) -> dict[str, Any] | None:
    """The forms with fewer bits, each against the model that it was made of."""
    rows = []
    for entry in results["quantized"].get("variants", []):
        of = str(entry.get("of") or "student")
        if entry.get("refused"):
            empty = [cells.cell(cells.NONE)] * 6
            rows.append(cells.row(str(entry["name"]), [cells.cell(of), *empty], note=str(entry["refused"])))
            continue
        change = cells.find(entry.get("differences"), figure="loss", model=entry["name"], other=of)
        shown = [
            cells.cell(of),
            cells.cell(cells.bytes_in_words(entry.get("bytes"))),
            cells.figure(entry.get("loss"), interval=(entry.get("intervals") or {}).get("loss")),
            cells.difference(change),
            *(cells.figure(entry.get(key)) for key in ("kl", "kl_to_student")),
            cells.figure(entry.get("agreement"), "{:.1%}"),
        ]
        rows.append(cells.row(str(entry["name"]), shown, note=str(entry.get("library") or "")))
    head = ["made of", "size", ("loss", "nats/token"), ("loss", "against it"), ("KL", "to teacher")]
    return cells.table("Quantized forms", [*head, ("KL", "to the student"), "agreement"], rows, "Form")


def _quantized_in_words(results: dict[str, Any]) -> str:
    found, reason = results["quantized"], variants.other_windows(results)
    if not cells.is_number(found.get("tokens")):
        return ""
    text = f"Each beside the model that it was made of, on the same {found['tokens']:,} tokens."
    return f"{text} The models above are no measure for them: {reason}." if reason else text


def gaps(results: dict[str, Any]) -> list[dict[str, str]]:
    """The parts of an evaluation that were asked for and not measured, with their reasons."""
    known = {*MODELS, "evaluate", "distil", "prune"}
    found = {part: why for part, why in results["missing"].items() if part not in known}
    for part, name in (("tasks", "score in"), ("generation", "text of"), ("behaviour", "behaviour of")):
        found |= {f"{name} {entry}": why for entry, why in (results[part].get("missing") or {}).items()}
    return [{"part": part, "why": str(why)} for part, why in found.items()]


def decided(record: RunRecord, results: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Every variant of the run against size and speed, and which to take."""
    rows = variants.rows(record, results)
    decision = decide.of_run(record, results, decide.Limits())
    results["decision"] = decide.in_results(decision)
    return {
        "decision": decision.why if rows else "",
        "decision_table": decide.table(decision) if rows else None,
        "decision_plots": variant_plots(rows, decision, directory),
    }


def variant_plots(rows: Sequence[dict[str, Any]], decision: decide.Decision, directory: Path) -> list[dict[str, Any]]:
    """Loss against size, of all rows, and against speed, of those timed in the same way."""
    return present(_against_size(rows, decision, directory), _against_speed(decision, directory))


def _against_size(rows: Sequence[dict[str, Any]], decision: decide.Decision, directory: Path) -> dict[str, Any] | None:
    # In bytes where they are known of all that was evaluated: quantized forms have the student's parameters.
    measured = [row for row in rows if row["measured"] == variants.TEST]
    key, label = "bytes", "size of the weights on disk, MB"
    if not all(row["bytes"] for row in measured):
        key, label = "parameters", "parameters, millions"
    points = [(row[key] / 1e6, row) for row in rows if row[key]]
    if len(points) < 2:
        return None
    front = [(row[key] / 1e6, row["loss"]) for row in decision.rows if row["front_size"] and row[key]]
    caption = "Further down is better, further left is smaller; the arrow is what distillation did."
    if len(front) > 1:
        caption += " The pale line is the front: nothing below it is smaller."
    if any(row["measured"] == variants.ELSEWHERE for _, row in points):
        caption += " Hollow marks were measured on other text than the rest and are no rivals, only whereabouts."
    svg = charts.variants(points, front, label, "quality_against_size", directory, arrows=True)
    return plot(svg, "Quality against size", caption)


def _against_speed(decision: decide.Decision, directory: Path) -> dict[str, Any] | None:
    rows = [row for row in decision.rows if row["front_speed"] is not None]
    if len(rows) < 2:
        return None
    points = [(row["tokens_per_second"], row) for row in rows]
    front = [(x, row["loss"]) for x, row in points if row["front_speed"]]
    label = f"tokens/s, {rows[0]['speed']}"
    caption = "Further down is better, further right is faster."
    return plot(
        charts.variants(points, front, label, "quality_against_speed", directory), "Quality against speed", caption
    )

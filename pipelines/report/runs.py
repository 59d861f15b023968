"""Several runs as one: which can be compared, and what their settings differ in. No torch."""

from collections.abc import Sequence
from typing import Any

from pipelines.config import Config, UserError
from pipelines.report.record import RunRecord, digest, read_named_run

PLACES = ("run.", "report.", "decide.")  # settings that only say where something lies or what is shown


def read(config: Config) -> list[RunRecord]:
    """The runs of report.runs. Raises UserError where they were not evaluated on the same text in the same way."""
    records = [read_named_run(config, name) for name in config.report.runs]
    for record in records:
        if not record.evaluation.get("models"):
            raise UserError(
                f"report.runs: expected evaluated runs, found no evaluate/results.json in {record.directory}. "
                f"Run stage=evaluate run.name={record.directory.name} first, or leave it out."
            )
    refuse_different(records, "the same text in the same windows", _text)
    return records


def refuse_other_teachers(records: Sequence[RunRecord]) -> None:
    """Raises UserError where the runs' students are of different teachers."""
    refuse_different(records, "one teacher", lambda record: {"teacher": teacher_hash(record)[:12] or "not known"})


def refuse_different(records: Sequence[RunRecord], expected: str, facts: Any) -> None:
    """Raises UserError where `facts` of a record, {name: value}, are not those of the first."""
    first = facts(records[0])
    for record in records[1:]:
        found = facts(record)
        different = [name for name in first if first[name] != found[name]]
        if different:
            told = "; ".join(
                f"{one.name} has {', '.join(f'{name} {values[name]}' for name in different)}"
                for one, values in ((records[0], first), (record, found))
            )
            raise UserError(
                f"report.runs: expected runs evaluated on {expected}, found: {told}. Their figures say nothing of each "
                "other: leave one out, or evaluate it again as the other."
            )


def _text(record: RunRecord) -> dict[str, Any]:
    """What the figures of an evaluation are of."""
    found = record.evaluation
    split = found.get("split")
    files = _input(record, "evaluate", "corpus")
    of_split = {name: value for name, value in files.items() if name.startswith((f"data/{split}/", "tokenizer/"))}
    return {
        "corpus": digest(of_split or files)[:12] if files else "not known",
        "split": split,
        "tokens": found.get("tokens"),
        "sequence_length": found.get("sequence_length"),
        "document_mask": found.get("document_mask"),
    }


def teacher_hash(record: RunRecord) -> str:
    """One sha256 for the teacher that the students of a run were held against; empty where that is not known."""
    files = _input(record, "evaluate", "teacher")
    weights = {name: value for name, value in files.items() if name.endswith((".safetensors", ".bin"))}
    return digest(weights or files) if files else ""


def _input(record: RunRecord, stage: str, name: str) -> dict[str, str]:
    return dict(record.manifests[stage].get("inputs", {}).get(name, {}).get("files", {}))


def settings(record: RunRecord) -> dict[str, Any]:
    """All settings that decided a run's results, by the stages that ran."""
    found: dict[str, Any] = {}
    for manifest in record.every_manifest().values():
        found |= {key: value for key, value in manifest.get("settings", {}).items() if not key.startswith(PLACES)}
    return found


def different_settings(records: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """(setting, its value in each run) of those in which runs differ; None where a run does not tell, since it has not
    run the stage that the setting belongs to: that alone is no difference."""
    of_each = [settings(record) for record in records]
    found = []
    for name in sorted({name for known in of_each for name in known}):
        told = [known[name] for known in of_each if name in known]
        if any(value != told[0] for value in told[1:]):
            found.append((name, [known.get(name) for known in of_each]))
    return found

"""Everything the report knows: what the stages left on disk, read once, with a reason for each part that is missing."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipelines import artifacts, gates
from pipelines.config import Config, TeacherMode, UserError
from pipelines.prune_settings import StepConfig
from pipelines.report_settings import run_of

MODELS = ("teacher", "pruned", "student")
# In metrics.jsonl: what a clock decides, or the processes' memory. All else is the same in a run that continues.
OF_THE_MACHINE = ("time", "tokens_per_second", "flops_per_second", "percent_of_peak", "percent_of_plan", "peak_bytes")
OF_THE_MACHINE += ("checkpoint_seconds", "seconds_to_first_step", "step_seconds", "memory_bytes")
STAGES = ("corpus", "teacher", "prune", "distil", "evaluate", "export")
BY_LAYER = (  # axes of which each layer has its own: name in scores.safetensors, title, unit
    ("ffn", "Feed-forward neurons", "neurons"),
    ("kv_groups", "KV groups", "groups"),
    ("heads", "Attention heads", "heads"),
)


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics.jsonl. A resumed run writes a step twice: its last row counts."""

    rows: tuple[dict[str, Any], ...] = ()

    def series(self, split: str, key: str) -> list[tuple[int, float]]:
        """(step, value) in the order of the steps; rows without a finite value are left out."""
        values = {
            int(row["step"]): float(row[key])
            for row in self.rows
            if row.get("split") == split and isinstance(row.get(key), int | float) and math.isfinite(row[key])
        }
        return sorted(values.items())

    @property
    def steps(self) -> int:
        return max((int(row["step"]) for row in self.rows), default=0)


@dataclass(frozen=True)
class AxisImportance:
    """Scores of one axis and what was kept: one array per layer, or a single one for an axis of the whole model."""

    name: str  # "hidden", "ffn", "kv_groups", "heads" or "layers"
    title: str
    unit: str  # what one score belongs to, in the plural
    label: str  # of the score axis
    scores: tuple[np.ndarray, ...]
    kept: tuple[np.ndarray, ...]  # bool
    words: tuple[str, str] = ("kept", "dropped")  # for True and False in kept

    @property
    def kept_units(self) -> int:
        return sum(int(kept.sum()) for kept in self.kept)

    @property
    def units(self) -> int:
        return sum(len(kept) for kept in self.kept)


@dataclass(frozen=True)
class StepRecord:
    """One step of a run in steps. first_loss: of its student as pruned, cross-entropy on the first batch of training in
    nats/token; None before that."""

    manifests: dict[str, dict[str, Any]]  # of prune and distil
    search: dict[str, Any]  # search.json; {} without a search
    first_loss: float | None


@dataclass(frozen=True)
class RunRecord:
    """What one run directory holds. Empty parts have their reason in `missing`, by part."""

    name: str
    directory: Path
    manifests: dict[str, dict[str, Any]]  # by stage; {} where the stage has none
    complete: dict[str, bool]
    evaluation: dict[str, Any]
    corpus: dict[str, Any]  # counts.json
    given: frozenset[str]  # stages whose result the configuration gives instead of running them
    teacher_metrics: Metrics
    distil_metrics: Metrics
    kept: dict[str, Any]  # kept.json
    search: dict[str, Any]  # search.json; {} without a search
    importance: tuple[AxisImportance, ...]
    quantized: dict[str, Any]  # quantized.json of the export
    steps: tuple[StepRecord, ...]  # of a run in steps
    missing: dict[str, str]

    @property
    def pending(self) -> list[str]:
        """Stages whose result is neither here nor given."""
        return [stage for stage in STAGES if not self.complete[stage] and stage not in self.given]

    def inputs(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By stage that ran, what it read, as `input_digests` tells it."""
        return {stage: input_digests(found.get("inputs")) for stage, found in self.every_manifest().items() if found}

    def every_manifest(self) -> dict[str, dict[str, Any]]:
        """Those of the steps before the last too, before prune: {"step1/prune": ...}."""
        earlier = {
            f"step{number}/{stage}": manifest
            for number, step in enumerate(self.steps[:-1], start=1)
            for stage, manifest in step.manifests.items()
        }
        places = list(self.manifests)
        before, after = places[: places.index("prune")], places[places.index("prune") :]
        return {s: self.manifests[s] for s in before} | earlier | {s: self.manifests[s] for s in after}


def read_run(config: Config) -> RunRecord:
    """Read a run's directory, whole or partial. A file that is there and cannot be read is an error, not a gap."""
    directory, corpus = artifacts.run_directory(config), artifacts.corpus_directory(config)
    missing: dict[str, str] = {}
    given = _given(config)
    manifests = {stage: read_json(directory / stage / "manifest.json") for stage in STAGES}
    complete = {stage: (directory / stage / "complete").is_file() for stage in STAGES}
    metrics = {stage: read_metrics(directory / stage / "metrics.jsonl") for stage in ("teacher", "distil")}
    for stage, what in (("teacher", "no training curve of the teacher"), ("distil", "no curves of distillation")):
        if not metrics[stage].rows:
            missing[stage] = _why_no_metrics(stage, what, complete[stage], stage in given)
    evaluation = read_json(directory / "evaluate" / "results.json")
    if evaluation and (judged := gates.read(directory)):
        evaluation |= {"gates": judged}
    if not evaluation:
        missing["evaluate"] = "no table: the evaluate stage has not run."
    kept = read_json(directory / "prune" / "kept.json")
    scores_file = directory / "prune" / "scores.safetensors"
    importance = read_importance(scores_file, kept)
    if not kept:
        why = "the student was given" if "prune" in given else "the prune stage has not run"
        missing["prune"] = f"no pruning in this run: {why}."
    elif not importance:
        missing["prune"] = "no scores: this pruning needed none (its layers were given)."
    return RunRecord(
        name=config.run.name,
        directory=directory,
        manifests=manifests,
        complete=complete,
        evaluation=evaluation,
        corpus=read_json(corpus / "counts.json"),
        given=given,
        teacher_metrics=metrics["teacher"],
        distil_metrics=metrics["distil"],
        kept=kept,
        search=read_json(directory / "prune" / "search.json"),
        importance=importance,
        quantized=read_json(directory / "export" / "quantized.json"),
        steps=_steps(config),
        missing=missing,
    )


def read_named_run(config: Config, name: str) -> RunRecord:
    """A run of report.runs, by the configuration that it was made with."""
    directory = run_of(config, name)
    own = Config()
    own.run.directory, own.run.name = str(directory.parent), directory.name
    stage = next((s for s in reversed(STAGES) if (directory / s / "config.yaml").is_file()), None)
    tree = yaml.safe_load((directory / stage / "config.yaml").read_text()) if stage else {}
    # What says where a run's parts lie; the rest may come from another version of the schema.
    own.data.corpus = (tree.get("data") or {}).get("corpus")
    own.model.path = (tree.get("model") or {}).get("path")
    own.student.path = (tree.get("student") or {}).get("path")
    own.teacher.mode = TeacherMode((tree.get("teacher") or {}).get("mode", TeacherMode.take.value))
    own.iterate.students = [StepConfig() for _ in (tree.get("iterate") or {}).get("students") or []]
    return replace(read_run(own), name=name if name.count("/") else directory.name)


def _steps(config: Config) -> tuple[StepRecord, ...]:
    places = [*artifacts.earlier_steps(config), artifacts.run_directory(config)] if config.iterate.students else []
    return tuple(
        StepRecord(
            {stage: read_json(place / stage / "manifest.json") for stage in ("prune", "distil")},
            read_json(place / "prune" / "search.json"),
            _first_loss(place / "distil" / "metrics.jsonl"),
        )
        for place in places
    )


def _first_loss(metrics: Path) -> float | None:
    """A step's loss is taken before its update: that of the first step is the loss of what training starts from."""
    rows = read_metrics(metrics).rows
    return next((row["ce"] for row in rows if row.get("split") == "train" and row["step"] == 1 and "ce" in row), None)


def _given(config: Config) -> frozenset[str]:
    places = {
        "corpus": artifacts.corpus_directory(config),
        "teacher": artifacts.teacher_directory(config).parent,
        "prune": artifacts.student_start_directory(config).parent,
    }
    return frozenset(
        s for s, path in places.items() if path.resolve() != artifacts.stage_directory(config, s).resolve()
    )


def _why_no_metrics(stage: str, what: str, complete: bool, given: bool) -> str:
    if stage == "teacher" and (complete or given):
        return f"{what}: it was taken as it is."
    return f"{what}: the {stage} stage has not run." if not complete else f"{what}: no metrics.jsonl in {stage}/."


def read_metrics(path: Path) -> Metrics:
    """Rows of a metrics.jsonl; a line cut off by a kill is left out."""
    if not path.is_file():
        return Metrics()
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return Metrics(tuple(rows))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: expected JSON, found an error at line {error.lineno}: {error.msg}. "
            "Run the stage that wrote it again with overwrite=true."
        ) from None


def read_importance(scores_file: Path, kept: dict[str, Any]) -> tuple[AxisImportance, ...]:
    """Axes that were scored, each with what was kept.

    scores_file: hidden, ffn.<layer>, heads.<layer>, kv_groups.<layer>, block_influence, or nothing where nothing had
        to be ranked; removed and its figures where layers were left out. KV groups that all stay are left out.
    kept: layers by the teacher's numbers from 1; channels, neurons and heads from 0, per kept layer.
    """
    if not kept or not scores_file.is_file():
        return ()
    try:
        scores = load_file(scores_file)
    except SafetensorError as error:
        raise UserError(f"{scores_file}: expected a safetensors file, found: {error}. Run prune again.") from None
    axes = []
    if "hidden" in scores:
        mask = _mask(kept.get("hidden"), len(scores["hidden"]))
        axes.append(
            AxisImportance("hidden", "Hidden channels", "channels", "activation norm", (scores["hidden"],), (mask,))
        )
    for name, title, unit in BY_LAYER:
        if f"{name}.1" in scores:
            rows = tuple(scores[f"{name}.{n}"] for n in range(1, len(scores["block_influence"]) + 1))
            by_layer = kept.get("groups" if name == "kv_groups" else name) or {}
            dropped = kept.get("layers") and set(range(1, len(rows) + 1)) - set(kept["layers"])
            masks = tuple(
                np.zeros(len(row), bool) if dropped and n in dropped else _mask(by_layer.get(str(n)), len(row))
                for n, row in enumerate(rows, start=1)
            )
            if name != "kv_groups" or any(not mask.all() for mask in masks):
                axes.append(AxisImportance(name, title, unit, "activation norm", rows, masks))
    if "block_influence" in scores:
        influence = scores["block_influence"]
        mask = _mask([n - 1 for n in kept["layers"]] if kept.get("layers") else None, len(influence))
        axes.append(AxisImportance("layers", "Layers", "layers", "block influence", (influence,), (mask,)))
    if "removed" in scores and kept.get("layers"):
        axes += _removals(scores, set(kept["layers"]))
    return tuple(axes)


def _removals(scores: dict[str, np.ndarray], kept: set[int]) -> list[AxisImportance]:
    """What leaving layers out costs, where it was measured: of every block as long as the one that went, or of every
    layer by itself. By the loss, above that of the whole teacher; by the score of a task where there is no loss."""
    removed, layers = scores["removed"].astype(bool), scores["removed"].shape[1]
    away = np.array([number not in kept for number in range(1, layers + 1)])
    by_loss = bool(np.isfinite(scores["removed_loss"]).any())
    values = scores["removed_loss" if by_loss else "removed_task"]
    label = "loss without, nats/token" if by_loss else "accuracy without"
    whole = values[~removed.any(axis=1)]
    if by_loss and len(whole) and np.isfinite(whole[0]):
        values, label = values - whole[0], "loss above the teacher's, nats/token"
    length, places = int(away.sum()), np.flatnonzero(away)
    if length > 1 and places[-1] - places[0] == length - 1:
        found = np.full(layers - length + 1, np.nan)
        for mask, value in zip(removed, values, strict=True):
            first = int(mask.argmax())
            if mask.sum() == length and mask[first : first + length].all():
                found[first] = value
        if np.isfinite(found).sum() > 1:
            taken = np.arange(len(found)) == places[0]
            title, words = f"Blocks of {length} layers left out", ("the block that went", "other blocks")
            return [AxisImportance("removals", title, "blocks", label, (found,), (taken,), words)]
    found = np.full(layers, np.nan)
    for mask, value in zip(removed, values, strict=True):
        if mask.sum() == 1:
            found[int(mask.argmax())] = value
    if not np.isfinite(found).any():
        return []
    return [AxisImportance("removals", "Layers left out one by one", "layers", label, (found,), (~away,))]


def _mask(indices: list[int] | None, size: int) -> np.ndarray:
    """True at indices; all True where None."""
    if indices is None:
        return np.ones(size, bool)
    mask = np.zeros(size, bool)
    mask[np.asarray(indices, int)] = True
    return mask


def digest(files: dict[str, str]) -> str:
    """One sha256 for files by their own: of the lines "<sha256>  <relative path>", sorted, as sha256sum writes them; of
    a single file its own."""
    lines = "".join(f"{found}  {path}\n" for path, found in sorted(files.items()))
    return next(iter(files.values())) if len(files) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def input_digests(inputs: Any) -> dict[str, dict[str, Any]]:
    """A manifest's inputs with one digest each: {name: {"path", "files": count, "sha256"}}."""
    return {
        name: {"path": entry.get("path", ""), "files": len(entry["files"]), "sha256": digest(entry["files"])}
        for name, entry in (inputs or {}).items()
        if entry.get("files")
    }

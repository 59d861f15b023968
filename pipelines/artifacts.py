"""The contract of a run's directory: what a stage reads, what it writes, and when that is whole. Imports no torch.

A run lives in <run.directory>/<run.name>/<stage>/. `begin` takes the stage's lock, compares settings and inputs with
those the directory was made from, and writes manifest.json; `Attempt.finish` adds figures and outputs and writes the
`complete` marker last. A directory without that marker is never read by another stage.
"""

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pipelines import lineage
from pipelines.config import Config, TeacherMode, UserError, distils_candidates
from pipelines.evaluation_settings import WINDOWS, is_task_file, prompt_files
from pipelines.files import (
    COMPLETE,
    MANIFEST,
    content,
    file_hash,
    fingerprint,
    new_directory,
    plain,
    read_object,
    write_atomic,
    write_json,
)
from pipelines.lock import Lock
from pipelines.report_settings import compared_files, compares, comparison_directory
from pipelines.stages import FREE, STAGES, Stage

__all__ = ["file_hash", "fingerprint", "new_directory", "write_atomic", "write_json"]  # the rest is defined here

TRAINING_STATE = ("checkpoints", "metrics.jsonl", "tensorboard", "candidates")  # the last: what a search distils
# What a stage takes from an earlier attempt where its own record of origin fits.
CHECKED = ("scores.safetensors", "search.json", "speed.json", "parts")


@dataclass
class StageContext:
    """What a stage's `run` gets. directory: <run.directory>/<run.name>/<stage>, which exists."""

    config: Config
    stage: str
    directory: Path

    def settings(self) -> dict[str, Any]:
        """As the function of this name gives them for the stage."""
        return settings(self.config, STAGES[self.stage])


# Where things are


def run_directory(config: Config) -> Path:
    return Path(config.run.directory) / config.run.name


def stage_directory(config: Config, stage: str) -> Path:
    if stage == "export" and config.export.step:
        return run_directory(config) / f"export-step-{config.export.step:07d}"
    if compares(config, stage):
        return comparison_directory(config)
    return (Path(config.run.directory) if STAGES[stage].of_machine else run_directory(config)) / stage


def log_file(config: Config, stage: str) -> Path:
    apart = STAGES[stage].of_machine or compares(config, stage)
    home = stage_directory(config, stage) if apart else run_directory(config)
    return home / "logs" / f"{stage}.log"


def corpus_directory(config: Config) -> Path:
    return Path(config.data.corpus) if config.data.corpus else stage_directory(config, "corpus")


def is_hugging_face(path: str | Path | None) -> bool:
    return path is not None and (Path(path) / "config.json").is_file()


def teacher_directory(config: Config) -> Path:
    """The Hugging Face directory of the teacher that prune, distil and evaluate read."""
    if config.teacher.mode is TeacherMode.take and config.model.path and is_hugging_face(config.model.path):
        return Path(config.model.path)
    return stage_directory(config, "teacher") / "hf"


def student_start_directory(config: Config) -> Path:
    """The Hugging Face directory that distillation starts from: the pruned student."""
    return Path(config.student.path) if config.student.path else stage_directory(config, "prune") / "hf"


def student_directory(config: Config) -> Path:
    """The Hugging Face directory of the distilled student."""
    return stage_directory(config, "distil") / "hf"


def kept_checkpoint(config: Config) -> Path:
    """The checkpoint of distil that export.step names."""
    return stage_directory(config, "distil") / "checkpoints" / f"step-{config.export.step:07d}"


INPUTS: dict[str, Callable[[Config], list[Path]]] = {
    "sources": lambda config: [p for s in config.data.sources if s.path for p in source_paths(s.path)],
    "domain_files": lambda config: [p for d in config.evaluate.domains if d.path for p in source_paths(d.path)],
    "baseline": lambda config: [Path(config.evaluate.baseline)] if config.evaluate.baseline else [],
    "tokenizer": lambda config: _tokenizer_files(config.data.tokenizer or config.model.path),
    "model": lambda config: [Path(config.model.path)] if config.model.path else [],
    "corpus": lambda config: [corpus_directory(config)],
    "teacher": lambda config: [teacher_directory(config)],
    "start": lambda config: [student_start_directory(config)],
    # The checksums stand for the files: they are of all of them, and hashed in no time.
    "student": lambda config: [
        kept_checkpoint(config) / "checksums.json" if config.export.step else student_directory(config)
    ],
    "teacher_run": lambda config: [stage_directory(config, "teacher")],
    "pruning": lambda config: [stage_directory(config, "prune")],
    "distillation": lambda config: [stage_directory(config, "distil")],
    "evaluation": lambda config: [stage_directory(config, "evaluate")],
    "scores": lambda config: [Path(config.prune.scores)] if config.prune.scores else [],
    "task": lambda config: [Path(config.prune.task)] if config.prune.task else [],
    "given_student": lambda config: [Path(config.evaluate.student)] if config.evaluate.student else [],
    "task_files": lambda config: [Path(name) for name in config.evaluate.tasks.names if is_task_file(name)],
    "prompts": lambda config: [Path(path) for path in prompt_files(config.evaluate) if path],
    "exported": lambda config: [stage_directory(config, "export")],
    "runs": compared_files,
    "steps": lambda config: [place / stage for place in earlier_steps(config) for stage in ("prune", "distil")],
}


def earlier_steps(config: Config) -> list[Path]:
    """Of a run in steps (iteration.py), where each but the last lies."""
    return [run_directory(config) / f"step{number}" for number in range(1, len(config.iterate.students))]


def source_paths(path: str) -> list[Path]:
    """What a source's path names: itself, the files of a pattern, or the prefix of a Megatron data set's two files."""
    if path.endswith((".bin", ".idx")):
        return [Path(path).with_suffix("")]
    if Path(path).exists() or not glob.has_magic(path):
        return [Path(path)]
    return sorted(Path(file) for file in glob.glob(path, recursive=True))


def _tokenizer_files(directory: str | None) -> list[Path]:
    if not directory:
        return []
    return sorted(f for f in Path(directory).glob("*") if "token" in f.name and f.suffix in (".json", ".model"))


# What a stage is made from


def sidecar_directory(config: Config) -> Path:
    return Path(config.run.directory) / ".hashes"


def settings(config: Config, stage: Stage) -> dict[str, Any]:
    """{dotted path: value} of the settings that decide the stage's result."""
    flat: dict[str, Any] = {}
    tree = json.loads(json.dumps(asdict(config), default=plain))
    for path in (*stage.settings, *_of_search(config, stage), *_of_quantization(config, stage)):
        value = tree
        for key in path.split("."):
            value = value[key]
        if isinstance(value, dict):
            flat |= {f"{path}.{k}": v for k, v in _flatten(value).items() if k.rsplit(".", 1)[-1] not in FREE}
        else:
            flat[path] = value
    return flat


def _of_search(config: Config, stage: Stage) -> tuple[str, ...]:
    """What decides a search for the student's shape beside the stage's own: the distillation of its candidates."""
    distils = stage.name == "prune" and distils_candidates(config)
    return ("distil", "distil.validation_batches", "run.seed") if distils else ()


def _of_quantization(config: Config, stage: Stage) -> tuple[str, ...]:
    """What decides the figures of quantized variants: the windows, and what models are built as."""
    names = (*WINDOWS, "batches", "micro_batch_size", "precision")
    ours = (*(f"evaluate.{name}" for name in names), "distil.precision", "distil.document_mask")
    return ours if stage.name == "export" and config.export.quantize else ()


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{k}": v for k, v in _flatten(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def inputs(config: Config, stage: Stage) -> dict[str, dict[str, Any]]:
    """{name: {"path": ..., "files": {relative path: sha256}}} of what the stage reads.

    Raises UserError where something that it must read is not there or was not finished.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("runs",) if compares(config, stage.name) else stage.reads + stage.may_read:
        paths = INPUTS[name](config)
        for number, path in enumerate(paths):
            absent = name not in stage.reads and not path.exists()
            files = {} if absent else fingerprint(path, sidecar_directory(config))
            if name in stage.reads:
                _require(config, stage, name, path, bool(files))
            if files:
                found[name if len(paths) == 1 else f"{name}[{number}]"] = {"path": str(path), "files": files}
    return found


def _require(config: Config, stage: Stage, name: str, path: Path, present: bool) -> None:
    maker = path if (path / MANIFEST).is_file() or path.name in STAGES else path.parent
    unfinished = (maker / MANIFEST).is_file() and not is_complete(maker)
    if present and not unfinished:
        return
    ours = maker.parent == run_directory(config) and maker.name in STAGES
    remedy = f"Run stage={maker.name} first." if ours or unfinished else "Check the path."
    found = "a directory whose stage has not finished" if unfinished else "nothing"
    raise UserError(f"stage {stage.name}: expected {name} in {path}, found {found}. {remedy}")


def is_complete(directory: str | Path) -> bool:
    return (Path(directory) / COMPLETE).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest.json of a stage's directory; {} where there is none."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return {}
    return read_object(path, "Remove the directory.")


class State(Enum):
    new = "new"
    unfinished = "unfinished"  # same settings and inputs: it continues
    finished = "finished"
    changed = "changed"  # asks for overwrite


@dataclass
class Examination:
    state: State
    changes: list[str]
    settings: dict[str, Any]
    inputs: dict[str, Any]
    altered: tuple[str, ...] = ()  # files of a finished stage that hold something else now


def examine(config: Config, stage: Stage) -> Examination:
    """Whether a stage is to be started, continued or left alone.

    Raises UserError on changes, and on files that were altered since, without overwrite, unless the stage only shows
    what others wrote.
    """
    directory = stage_directory(config, stage.name)
    now_settings, now_inputs = settings(config, stage), inputs(config, stage)
    manifest = read_manifest(directory)
    if not manifest:
        return Examination(State.new, [], now_settings, now_inputs)
    differences = lineage.changes(manifest, now_settings, now_inputs)
    _refuse(config, stage, differences)
    if differences:
        return Examination(State.changed, differences, now_settings, now_inputs)
    if not is_complete(directory):
        return Examination(State.unfinished, [], now_settings, now_inputs)
    altered = lineage.alterations(manifest, directory, sidecar_directory(config))
    if altered and not (config.overwrite or stage.derived):
        shown = "\n  ".join(list(altered.values())[:20])
        raise UserError(
            f"stage {stage.name}: {directory} is finished, but its files are not as it wrote them:\n  {shown}\n"
            "Put them back, give overwrite=true to start it again (training checkpoints are moved aside), or another "
            "run.name."
        )
    state = State.changed if altered else State.finished
    return Examination(state, list(altered.values()), now_settings, now_inputs, tuple(altered))


def refuse_changed_settings(config: Config, stage: Stage) -> None:
    """What `examine` refuses and needs no input to be there: told before earlier stages spend hours."""
    manifest = read_manifest(stage_directory(config, stage.name))
    if manifest:
        _refuse(config, stage, lineage.changes(manifest, settings(config, stage), manifest.get("inputs", {})))


def _refuse(config: Config, stage: Stage, differences: list[str]) -> None:
    if not differences or config.overwrite or stage.derived:
        return
    directory = stage_directory(config, stage.name)
    how_far = "finished" if is_complete(directory) else "unfinished"
    shown = "\n  ".join(differences[:20])
    raise UserError(
        f"stage {stage.name}: {directory} is {how_far} and was made from other settings or inputs:\n  {shown}\n"
        "Give overwrite=true to start it again (training checkpoints are moved aside), or another run.name."
    )


# A stage's life


class Attempt:
    """One running stage: holds the lock from `begin` until `finish` or `release`."""

    def __init__(self, context: StageContext, lock: Lock | None, manifest: dict[str, Any]) -> None:
        self.context, self.lock, self.manifest, self.started = context, lock, manifest, time.monotonic()

    def finish(self, figures: dict[str, Any] | None) -> None:
        """Write figures and outputs to manifest.json, then the complete marker."""
        if self.lock is None:
            return
        directory, sidecars = self.context.directory, sidecar_directory(self.context.config)
        for file in content(directory):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        self.manifest |= {
            "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 1),
            "figures": figures or {},
            "outputs": fingerprint(directory, sidecars),
        }
        write_json(directory / MANIFEST, self.manifest)
        write_atomic(directory / COMPLETE, hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest() + "\n")
        self.release()

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()


def begin(config: Config, stage_name: str, say: Callable[[str], None] = print) -> Attempt:
    """Lock and prepare the stage's directory. One process per stage calls it.

    A changed stage (with overwrite) starts from an empty directory, its training state moved aside; an unfinished one
    keeps what it has. Raises UserError where another live process writes there.
    """
    stage, directory = STAGES[stage_name], stage_directory(config, stage_name)
    directory.mkdir(parents=True, exist_ok=True)
    context = StageContext(config, stage_name, directory)
    if not stage.kept:
        return Attempt(context, None, {})
    lock = Lock(directory / "lock", say)
    try:
        examination = examine(config, stage)
        (directory / COMPLETE).unlink(missing_ok=True)
        for name in examination.altered:  # also of what says itself what it was made of
            (directory / name).unlink()
        if examination.state is State.changed:
            move_aside(directory, say)
        manifest = {
            "stage": stage_name,
            "run": config.run.name,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "settings": examination.settings,
            "inputs": examination.inputs,
            **lineage.describe(config),
        }
        write_atomic(directory / "config.yaml", lineage.to_yaml(json.loads(json.dumps(asdict(config), default=plain))))
        write_json(directory / MANIFEST, manifest)
    except BaseException:
        lock.release()
        raise
    return Attempt(context, lock, manifest)


def move_aside(directory: Path, say: Callable[[str], None]) -> None:
    """Empty a stage's directory. Training state (and what was moved aside before) stays, under a name with the date;
    what says itself what it was made of stays as it is."""
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    for path in sorted(directory.iterdir(), key=lambda p: (p.name == MANIFEST, p.name not in TRAINING_STATE, p.name)):
        if path.name in TRAINING_STATE:
            kept = path.with_name(f"{path.name}.{date}")
            path.rename(kept)
            say(f"moved {path} to {kept}")
        elif path.name in CHECKED:
            continue
        elif path.is_dir() and not path.is_symlink() and not path.name.startswith(TRAINING_STATE):
            shutil.rmtree(path)
        elif not path.name.startswith((*TRAINING_STATE, "lock")):
            path.unlink()

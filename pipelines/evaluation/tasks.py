"""Scores of teacher, pruned and student in tasks, every pair of model and task by one rank."""

import gc
import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines import console, processes, stopping
from pipelines.config import Config, UserError
from pipelines.evaluation import harness, hugging_face, task_files
from pipelines.evaluation.harness import Task
from pipelines.evaluation.parts import Pieces
from pipelines.evaluation_settings import TASK_FILES, is_task_file
from pipelines.model.parallel import on_every_rank, on_first_rank

DIRECTORY = "task_files"  # of the stage's directory: what is made from held-out text
INPUTS = {"teacher": "teacher", "pruned": "start", "student": "student"}  # of the stage (artifacts.INPUTS), by model
Z = 1.959964  # standard errors on either side of a 95 % interval


@dataclass(frozen=True)
class Models:
    """directories: by name. precision: "fp32" or "bf16". device: "cpu" or "cuda"."""

    directories: dict[str, Path]
    corpus: Path
    precision: str
    device: str


def settings_of(config: Config) -> dict[str, Any]:
    """What decides the part beside models and corpus: the contents of files that are named, too."""
    settings = config.evaluate.tasks
    named = [name for name in settings.names if is_task_file(name)]
    return {"files": {name: _content(name) for name in named}, "split": config.evaluate.split, "seed": config.run.seed}


def measure(config: Config, models: Models, pieces: Pieces, directory: Path) -> dict[str, Any]:
    """results.json's "tasks", and "missing": {task: why a model has no score in it}.

    pieces: keeps each pair's score. directory: gets the task files that are made. Every rank calls it; no collective
    while ranks are at work. Raises UserError without lm-evaluation-harness, and Stopped where the stage is to end.
    """
    settings, version = config.evaluate.tasks, harness.version()
    tasks, missing = on_first_rank(lambda: _tasks(config, models.corpus, directory))
    pairs = [(name, Task(**task)) for name in models.directories for task in tasks]
    number, workers = _worker(settings.parallelize)
    origin = {"harness": version, "precision": models.precision, "limit": settings.limit}

    def work() -> dict[str, Any]:
        found: list[Any] = []
        bench = Bench(models, settings.parallelize, settings.micro_batch_size)
        mine = pairs[number::workers] if number is not None else []
        with console.progress("tasks", len(mine), "pairs") as bar:
            for name, task in mine:
                if stopping.asked():
                    return {"found": found, "stopped": True}
                found.append([name, task.name, _pair(pieces, bench, name, task, origin, settings.limit)])
                bar.advance(1, detail=f"{name} {task.name}")
        bench.clear()
        return {"found": found, "stopped": False}

    rounds = on_every_rank(work)
    if any(each["stopped"] for each in rounds):
        raise stopping.Stopped("stopped as asked: the tasks that are scored are kept, and the same command continues.")
    scores = {(name, task): score for each in rounds for name, task, score in each["found"]}
    for _, task in pairs:
        reasons = {n: s["gap"] for n in models.directories if "gap" in (s := scores[n, task.name])}
        if reasons:
            missing[task.name] = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    result = _results(config, version, [task["name"] for task in tasks], list(models.directories), scores)
    for task in (task["name"] for task in tasks):
        row = [f"{name} {shown[task]['value']:.4f}" for name, shown in result["models"].items() if task in shown]
        if row:
            metric = next(shown[task]["metric"] for shown in result["models"].values() if task in shown)
            console.say(f"tasks  {task}, {metric}: {', '.join(row)}")
    return result | {"missing": missing}


class Bench:
    """The model that a rank has open: one at a time."""

    def __init__(self, models: Models, spread: bool, micro_batch_size: int) -> None:
        self._models, self._spread, self._size = models, spread, micro_batch_size
        self._open: tuple[str, Any] | None = None

    def scorer(self, name: str) -> harness.Scorer:
        """Raises UserError where the model cannot be opened, or has another tokenizer than the teacher."""
        if self._open is None or self._open[0] != name:
            self.clear()
            directory = self._models.directories[name]
            tokenizer = hugging_face.open_tokenizer(directory, self._models.corpus)
            model = hugging_face.load(
                directory, precision=self._models.precision, device=self._models.device, spread=self._spread
            )
            self._open = name, harness.Scorer(model, tokenizer, self._size)
        return self._open[1]

    def clear(self) -> None:
        self._open = None
        gc.collect()
        if self._models.device == "cuda":
            torch.cuda.empty_cache()


def _pair(
    pieces: Pieces, bench: Bench, name: str, task: Task, origin: dict[str, Any], limit: int | None
) -> dict[str, Any]:
    """The score, or {"gap": reason}, which is not kept."""
    asked = {"task": task.name, "shots": task.shots, "metric": task.metric, "content": _content(task.source)}
    try:
        return pieces.measure(
            f"{name}.{task.name}", origin | asked, [INPUTS[name]], lambda: bench.scorer(name).score(task, limit)
        )
    except UserError as error:
        return {"gap": str(error)}
    except torch.OutOfMemoryError as error:
        return {"gap": f"out of memory on this device: {error}. Lower evaluate.tasks.micro_batch_size."}


def _tasks(config: Config, corpus: Path, directory: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(the tasks, as Task's fields; reasons for those that cannot be made). Writes those made from held-out text."""
    settings, found, missing = config.evaluate.tasks, [], {}
    for name, source in _sources(settings.names):
        if name in task_files.GENERATED:
            try:
                made = task_files.write(
                    corpus,
                    config.evaluate.split,
                    name,
                    directory / DIRECTORY,
                    questions=settings.questions,
                    seed=config.run.seed,
                )
                source = str(made)
            except UserError as error:
                missing[name] = str(error)
                continue
        found.append(
            {"name": name, "source": source, "shots": settings.shots.get(name), "metric": settings.metrics.get(name)}
        )
    return found, missing


def _sources(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name in the results, source) of every task: those of a directory one by one."""
    for name in names:
        if is_task_file(name) and Path(name).is_dir():
            yield from ((path.stem, str(path)) for path in _in_directory(Path(name)))
        else:
            yield (Path(name).stem if is_task_file(name) else name), name


def _in_directory(directory: Path) -> list[Path]:
    """Task files; what begins with _ is included by others."""
    return sorted(p for p in directory.iterdir() if p.suffix in TASK_FILES and p.name[0] != "_")


def _content(source: str) -> str | None:
    """The hash of a task file and of the files beside it, which it may name; None for a name of the registry."""
    if not is_task_file(source):
        return None
    path = Path(source)
    beside = [path] if path.suffix == ".jsonl" else sorted((path if path.is_dir() else path.parent).glob("*"))
    digest = hashlib.sha256()
    for file in beside:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _worker(spread: bool) -> tuple[int | None, int]:
    """(this rank's number among those at work, None for one that only waits; how many are)."""
    if not spread:
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    each = processes.local_world_size()
    number, local = divmod(torch.distributed.get_rank(), each)
    return (None if local else number), max(1, torch.distributed.get_world_size() // each)


def _results(
    config: Config, version: str, tasks: list[str], models: list[str], scores: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    good = {pair: score for pair, score in scores.items() if "gap" not in score}
    shown = {
        name: {
            task: {key: value for key, value in good[name, task].items() if key != "scores"}
            for task in tasks
            if (name, task) in good
        }
        for name in models
    }
    result: dict[str, Any] = {"harness": version, "models": shown}
    if published := config.evaluate.tasks.published:
        result["published"] = {name: dict(values) for name, values in published.items()}
    both = [(name, other) for place, name in enumerate(models) for other in models[:place]]
    result["differences"] = [
        {"task": task, "model": name, "other": other} | difference(good[name, task], good[other, task])
        for task in tasks
        for name, other in both
        if (name, task) in good and (other, task) in good
    ]
    return result


def difference(score: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """score - other with its 95 % interval, and whether that leaves 0 out; None where the harness gives no error.

    By pairs of answers to the same questions where the score is their mean, as the standard error of the mean of their
    differences (arXiv 2411.00640, section 4.2); otherwise as that of independent scores.
    """
    found, half = score["value"] - other["value"], None
    ours, theirs = score["scores"], other["scores"]
    if ours and theirs and len(ours) == len(theirs) > 1:
        apart = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean = math.fsum(apart) / len(apart)
        variance = math.fsum((value - mean) ** 2 for value in apart) / (len(apart) - 1)
        half = Z * math.sqrt(variance / len(apart))
    elif score["stderr"] is not None and other["stderr"] is not None:
        half = Z * math.hypot(score["stderr"], other["stderr"])
    if half is None:
        return {"difference": found, "low": None, "high": None, "larger_than_noise": None}
    return {"difference": found, "low": found - half, "high": found + half, "larger_than_noise": abs(found) > half}

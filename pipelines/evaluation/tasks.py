"""Scores of teacher, pruned and student in tasks, every pair of model and task by one rank."""

import hashlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipelines import console
from pipelines.config import Config, UserError
from pipelines.evaluation import harness, task_files
from pipelines.evaluation.harness import Task
from pipelines.evaluation.intervals import Z, paired, told
from pipelines.evaluation.parts import Pieces
from pipelines.evaluation.sharing import INPUTS, Bench, Models, share
from pipelines.evaluation_settings import GENERATED, TASK_FILES, is_task_file
from pipelines.model.parallel import on_first_rank

DIRECTORY = "task_files"  # of the stage's directory: what is made from held-out text


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
    fetched = Path(config.fetch.directory) / "tasks"
    origin = {"harness": version, "precision": models.precision, "limit": settings.limit}

    def work(bench: Bench, pair: tuple[str, Task]) -> dict[str, Any]:
        name, task = pair
        asked = {"task": task.name, "shots": task.shots, "metric": task.metric, "content": _content(task.source)}

        def score() -> dict[str, Any]:
            return harness.score(*bench.open(name), task, settings.limit, settings.micro_batch_size, fetched)

        return pieces.measure(f"{name}.{task.name}", origin | asked, INPUTS[name], score)

    found = share("tasks", pairs, models, work)
    scores = {(name, task.name): score for (name, task), score in zip(pairs, found, strict=True)}
    for _, task in pairs:
        reasons = {n: s["gap"] for n in models.directories if "gap" in (s := scores[n, task.name])}
        if reasons:
            missing[task.name] = in_words(reasons, len(models.directories))
    result = _results(config, version, [task["name"] for task in tasks], list(models.directories), scores)
    for task in (task["name"] for task in tasks):
        row = [f"{name} {shown[task]['value']:.4f}" for name, shown in result["models"].items() if task in shown]
        if row:
            metric = next(shown[task]["metric"] for shown in result["models"].values() if task in shown)
            console.say(f"tasks  {task}, {metric}: {', '.join(row)}")
    return result | {"missing": missing}


def in_words(reasons: dict[str, str], models: int) -> str:
    """{model: reason} in words; a reason that all models have is told without their names."""
    if len(reasons) == models and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _tasks(config: Config, corpus: Path, directory: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(the tasks, as Task's fields; reasons for those that cannot be made). Writes those made from held-out text."""
    settings, found, missing = config.evaluate.tasks, [], {}
    for name, source in _sources(settings.names):
        if name in GENERATED:
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
    if published := {name: dict(values) for name, values in config.evaluate.tasks.published.items() if values}:
        result["published"] = published
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

    By pairs of answers to the same questions where the score is their mean; otherwise as that of independent scores.
    """
    found = score["value"] - other["value"]
    ours, theirs = score["scores"], other["scores"]
    if ours and theirs and len(ours) == len(theirs):
        return paired(ours, theirs)
    if score["stderr"] is None or other["stderr"] is None:
        return told(found, None, None)
    half = Z * math.hypot(score["stderr"], other["stderr"])
    return told(found, found - half, found + half)

"""The tasks and prompts of an evaluation: names, files and numbers of those that are asked for."""

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config import Config, UserError
from pipelines.evaluation_settings import (
    GENERATED,
    MODELS,
    SHIPPED,
    TASK_FILES,
    TasksConfig,
    is_task_file,
    prompt_files,
)
from pipelines.prompts import read_prompts, read_text
from pipelines.questions import read_questions


def check(config: Config, stages: Collection[str]) -> None:
    """evaluate.tasks and the files of prompts, where the stage is asked for. A file's content is looked at when it
    is read."""
    if "evaluate" not in stages:
        return
    student = config.evaluate.student
    if student and not (Path(student) / "config.json").is_file():
        raise UserError(
            f"evaluate.student={student}: expected a Hugging Face directory with a config.json, found none. Check the "
            "path."
        )
    for file in prompt_files(config.evaluate):
        if file and not Path(file).is_file():
            raise UserError(
                f"{file}: expected a file, as evaluate.generation or evaluate.behaviour names it, found none. Check "
                "the path."
            )
    settings = config.evaluate.tasks
    if not settings.names:
        return
    for name in settings.names:
        path = Path(name)
        if not is_task_file(name):
            continue
        if not path.exists():
            raise UserError(
                f"evaluate.tasks.names: expected a task file, a directory of them or a .jsonl of questions in {name}, "
                "found nothing. Check the path."
            )
        if not path.is_dir() and path.suffix not in TASK_FILES:
            raise UserError(f"evaluate.tasks.names: expected a .yaml or .jsonl, found {name}. Rename it.")
    twice = [name for name, count in Counter(Path(name).stem for name in settings.names).items() if count > 1]
    if twice:
        raise UserError(
            f"evaluate.tasks.names: expected every task once, found {twice[0]} more often. Rename its file, or leave "
            "one out."
        )
    for model, row in settings.published.items():
        numbers = isinstance(row or {}, dict) and all(isinstance(v, int | float) for v in (row or {}).values())
        if model not in MODELS:
            raise UserError(f"evaluate.tasks.published: expected {', '.join(MODELS)}, found {model!r}. Correct it.")
        if not numbers:
            raise UserError(
                f"evaluate.tasks.published.{model}: expected a number for each task, found {row}. Write "
                "{mmlu: 0.605}."
            )
        _check_shares(model, row or {}, settings)
    for name, shots in settings.shots.items():
        if shots < 0:
            raise UserError(f"evaluate.tasks.shots.{name}: expected 0 or more, found {shots}. Raise it.")


SHARES = ("acc", "exact_match")  # metrics that are shares begin with one of them


def _check_shares(model: str, row: dict[str, Any], settings: TasksConfig) -> None:
    """Published scores are in the metric's unit: what is no share has its metric named."""
    for name, value in row.items():
        if not 0 <= value <= 1 and settings.metrics.get(name, "acc").startswith(SHARES):
            share = f" Write {value / 100:g}" if 1 < value <= 100 else " Correct it"
            other = "" if name in GENERATED else ", or name the metric with evaluate.tasks.metrics where it is no share"
            raise UserError(
                f"evaluate.tasks.published.{model}.{name}: expected a share from 0 to 1, found {value}.{share}{other}."
            )


def warnings(config: Config, stages: Collection[str]) -> Iterator[str]:
    """Files that cannot be read, which become gaps of the evaluation, and settings without effect."""
    if "evaluate" not in stages:
        return
    yield from (f"{reason} Until then it is a gap, and the rest is evaluated" for reason in _unreadable(config))
    yield from _not_asked_for(config.evaluate.tasks)
    generation = config.evaluate.generation
    for name in ("temperature", "top_p"):
        if generation.greedy and getattr(generation, name) != 1:
            yield f"evaluate.generation.{name} has no effect with evaluate.generation.greedy=true"


def _not_asked_for(settings: TasksConfig) -> Iterator[str]:
    """The names of shots, metrics and published scores that no task asked for has: mistyped, or those of an experiment
    whose other tasks are left out."""
    if not settings.names:
        return
    known: set[str] = set()
    for name in settings.names:
        path = Path(name)
        if is_task_file(name):
            known |= {file.stem for file in path.iterdir()} if path.is_dir() else {path.stem}
        else:
            known.add(name)
    given: dict[str, dict[str, Any]] = {"shots": settings.shots, "metrics": settings.metrics}
    given |= {f"published.{model}": row or {} for model, row in settings.published.items()}
    for name in dict.fromkeys(name for values in given.values() for name in values if name not in known):
        places = [setting for setting, values in given.items() if name in values]
        close = difflib.get_close_matches(name, known.difference(*(given[place] for place in places)), n=1, cutoff=0.7)
        hint = f": did you mean {close[0]}?" if close else ""
        yield f"evaluate.tasks: {name} in {', '.join(places)} is of no task of evaluate.tasks.names{hint}"


def _unreadable(config: Config) -> Iterator[str]:
    """What is wrong with files of questions and prompts."""
    for name in config.evaluate.tasks.names:
        if Path(name).suffix == ".jsonl":
            yield from _reason(partial(read_questions, name, "evaluate.tasks.names"))
    generation, behaviour = config.evaluate.generation, config.evaluate.behaviour
    if generation.prompts and generation.count:
        path = Path(generation.prompts)
        yield from _reason(partial(read_prompts, path, "evaluate.generation.prompts", categories=False))
    if not behaviour.prompts:
        return
    if behaviour.prompts != SHIPPED:
        prompts = Path(behaviour.prompts)
        yield from _reason(partial(read_prompts, prompts, "evaluate.behaviour.prompts", categories=True))
    for name in ("lexicon", "refusals"):
        if file := getattr(behaviour, name):
            yield from _reason(partial(read_text, Path(file), f"evaluate.behaviour.{name}"))


def _reason(read: Callable[[], Any]) -> Iterator[str]:
    try:
        read()
    except UserError as error:
        yield str(error)

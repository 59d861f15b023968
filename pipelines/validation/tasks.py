"""The tasks and prompts of an evaluation: names, files and numbers of those that are asked for."""

import difflib
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipelines.config import Config, UserError
from pipelines.evaluation_settings import MODELS, TASK_FILES, is_task_file, prompt_files


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
    known: set[str] = set()
    whole = True  # every name is known before the directories of task files are read
    for name in settings.names:
        path = Path(name)
        if not is_task_file(name):
            known.add(name)
            continue
        if not path.exists():
            raise UserError(
                f"evaluate.tasks.names: expected a task file, a directory of them or a .jsonl of questions in {name}, "
                "found nothing. Check the path."
            )
        if path.is_dir():
            whole = False
        elif path.suffix not in TASK_FILES:
            raise UserError(f"evaluate.tasks.names: expected a .yaml or .jsonl, found {name}. Rename it.")
        else:
            known.add(path.stem)
    twice = [name for name, count in Counter(Path(name).stem for name in settings.names).items() if count > 1]
    if twice:
        raise UserError(
            f"evaluate.tasks.names: expected every task once, found {twice[0]} more often. Rename its file, or leave "
            "one out."
        )
    if not whole:
        known |= {file.stem for name in settings.names if Path(name).is_dir() for file in Path(name).iterdir()}
    for model, row in settings.published.items():
        numbers = isinstance(row or {}, dict) and all(isinstance(v, int | float) for v in (row or {}).values())
        if model not in MODELS:
            raise UserError(f"evaluate.tasks.published: expected {', '.join(MODELS)}, found {model!r}. Correct it.")
        if not numbers:
            raise UserError(
                f"evaluate.tasks.published.{model}: expected a number for each task, found {row}. Write "
                "{mmlu: 0.605}."
            )
    given: tuple[tuple[str, dict[str, Any]], ...] = (("shots", settings.shots), ("metrics", settings.metrics))
    for setting, values in (*given, *((f"published.{model}", row or {}) for model, row in settings.published.items())):
        for name in values:  # those of an experiment whose names are not asked for have no effect
            if name not in known and difflib.get_close_matches(name, known - set(values), n=1, cutoff=0.7):
                raise UserError(
                    f"evaluate.tasks.{setting}: expected tasks of evaluate.tasks.names ({', '.join(sorted(known))}), "
                    f"found {name!r}. Correct the name."
                )
    for name, shots in settings.shots.items():
        if shots < 0:
            raise UserError(f"evaluate.tasks.shots.{name}: expected 0 or more, found {shots}. Raise it.")

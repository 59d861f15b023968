"""Which settings are paths of this machine's file system, in one table. Imports no torch.

By it `~` is expanded, and a chain asks that what its jobs read and write is seen inside their container
(validation/cluster.py).
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.config import Config
from pipelines.evaluation_settings import SHIPPED, is_task_file
from pipelines.speeds import MEASURED, MODELLED


def _always(value: str) -> bool:
    return True


# {dotted name: whether a value is a path, and no word or name}; [] stands for each of a list.
OF_JOBS: dict[str, Callable[[str], bool]] = {
    "run.directory": _always,
    "model.path": _always,
    "student.path": _always,
    "data.corpus": _always,
    "data.tokenizer": _always,
    "data.sources[].path": _always,
    "prune.scores": _always,
    "prune.task": _always,
    "prune.search.speed": lambda value: value not in (MODELLED, MEASURED),
    "evaluate.student": _always,
    "evaluate.baseline": _always,
    "evaluate.tasks.names[]": is_task_file,
    "evaluate.domains[].path": _always,
    "evaluate.generation.prompts": _always,
    "evaluate.behaviour.prompts": lambda value: value != SHIPPED,
    "evaluate.behaviour.lexicon": _always,
    "evaluate.behaviour.refusals": _always,
    "report.runs[]": lambda value: "/" in value,  # others are names in run.directory
    "benchmark.docs": _always,
}
PATHS = (  # no job reads the others: of the cluster itself, and of a stage that is no part of a chain
    *OF_JOBS,
    *("cluster.image", "cluster.workdir", "cluster.python", "cluster.mounts[]", "fetch.directory"),
)


def of_jobs(config: Config) -> Iterator[tuple[str, str]]:
    """(setting, path) of everything that the stages of a chain read and write where it is given."""
    for pattern, is_path in OF_JOBS.items():
        for setting, holder, key in _places(config, pattern):
            value = _value(holder, key)
            if value and is_path(value):
                yield setting, value


def expand_home(config: Config) -> None:
    """`~` at the start of a path stands for the home directory, as in a shell."""
    for pattern in PATHS:
        for _, holder, key in _places(config, pattern):
            expanded = os.path.expanduser(_value(holder, key) or "") or _value(holder, key)
            if isinstance(holder, list):
                holder[int(key)] = expanded
            else:
                setattr(holder, str(key), expanded)


def _places(group: Any, pattern: str, name: str = "") -> Iterator[tuple[str, Any, str | int]]:
    """(setting, the group or list that holds it, its key there) of all that a pattern of PATHS stands for."""
    key, _, rest = pattern.partition(".")
    if key.endswith("[]"):
        entries = getattr(group, key[:-2])
        for number, entry in enumerate(entries):
            setting = f"{name}{key[:-2]}[{number}]"
            yield from _places(entry, rest, f"{setting}.") if rest else [(setting, entries, number)]
    elif rest:
        yield from _places(getattr(group, key), rest, f"{name}{key}.")
    else:
        yield name + key, group, key


def _value(holder: Any, key: str | int) -> Any:
    return getattr(holder, key) if isinstance(key, str) else holder[key]

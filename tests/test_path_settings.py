"""That no setting that is a path is forgotten: by `~`, and by the check of what a container sees."""

import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from pipelines.compose import compose
from pipelines.config import Config
from pipelines.path_settings import OF_JOBS, PATHS, of_jobs

NO_PATHS = {  # every other setting that can hold a text, with what it is
    "names of the run, its models, parts, splits and rows": (
        *("run.name", "run.project", "model.name", "model.shape.architecture", "stage", "evaluate.split"),
        *("evaluate.domains[].name", "report.name", "plan.gpu"),
    ),
    "keys of records": ("data.sources[].text_key", "evaluate.domains[].text_key"),
    "figures of models": ("gates[].figure", "gates[].of"),
    "text that is read itself": ("export.prompt", "export.terms"),
    "values by the name of a task or of a rope": (
        *("model.shape.rope_scaling", "evaluate.tasks.shots", "evaluate.tasks.metrics", "evaluate.tasks.published"),
    ),
    "what the Hub calls it": ("fetch.models[]", "fetch.datasets[]", "fetch.tasks[]", "fetch.files[]"),
    "words of SLURM": (
        *("cluster.name", "cluster.account", "cluster.partition", "cluster.qos", "cluster.constraint", "cluster.time"),
        *("cluster.sbatch_arguments[]", "cluster.srun_arguments[]"),
    ),
    "variables, which nothing expands": tuple(f"cluster.environment[].{part}" for part in ("name", "value", "why")),
}


def texts(group: type, name: str = "") -> Iterator[str]:
    """The dotted names of all settings whose type lets them hold a text, [] for each of a list."""
    types_of = typing.get_type_hints(group)
    for field in fields(group):
        yield from _of_type(types_of[field.name], name + field.name)


def _of_type(kind: Any, name: str) -> Iterator[str]:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for part in parts:
            yield from _of_type(part, name)
    elif origin is list:
        yield from _of_type(parts[0], f"{name}[]")
    elif is_dataclass(kind):
        yield from texts(typing.cast(type, kind), f"{name}.")
    elif kind in (str, Any) or origin is dict:
        yield name


def test_every_text_of_the_settings_is_a_path_or_is_known_to_be_none() -> None:
    stages = {
        f"cluster.stages.{field}.{key}" for field in vars(Config().cluster.stages) for key in ("partition", "time")
    }
    none = {name for names in NO_PATHS.values() for name in names} | stages
    found = set(texts(Config))
    assert found - none == set(PATHS), "add the new setting to pipelines/path_settings.py, or above with what it is"
    assert none <= found and not none & set(PATHS)


def given(pattern: str, value: str) -> str:
    """An override that sets one setting of PATHS."""
    group, listed, name = pattern.partition("[]")
    if not listed:
        return f"{group}={value}"
    return f"{group}=[{{{name[1:]}: {value}}}]" if name else f"{group}=[{value}]"


@pytest.mark.parametrize("quote", ["", '"'])
def test_the_home_directory_is_put_in_for_a_tilde(monkeypatch: pytest.MonkeyPatch, quote: str) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = compose([given(pattern, f"{quote}~/x{quote}") for pattern in PATHS])
    assert [path for _, path in of_jobs(config)] == ["/home/somebody/x"] * len(OF_JOBS)
    cluster = config.cluster
    elsewhere = [cluster.image, cluster.workdir, cluster.python, *cluster.mounts, config.fetch.directory]
    assert elsewhere == ["/home/somebody/x"] * 5


def test_words_and_names_are_no_paths() -> None:
    words = ["prune.search.speed=measured", "evaluate.behaviour.prompts=shipped", "evaluate.tasks.names=[mmlu,a.yaml]"]
    config = compose([*words, "report.runs=[quickstart,/a/b]"])
    assert list(of_jobs(config)) == [
        ("run.directory", "runs"),
        ("evaluate.tasks.names[1]", "a.yaml"),
        ("report.runs[1]", "/a/b"),
    ]

"""Pruning and distilling in steps, each student the next one's start: a run as a list of ordinary stages.

Step i of n lives in <run.directory>/<run.name>/step<i>/{prune,distil}; the last one is the run's own prune and distil,
so that evaluate, export and report find it where they always do. The steps before the last are what the run's own prune
starts from, and belong to stage=prune. Everything here follows from the settings alone. Imports no torch.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipelines import artifacts, grid, planning
from pipelines.choices import DepthMethod, StepTeacher
from pipelines.config import Config, ShapeConfig, StudentConfig, layout, searches
from pipelines.families import ModelShape
from pipelines.prune_settings import PRUNED_SIZES, IterateConfig, ProtectConfig, TargetConfig

LIMITS = ("parameters", "ratio")
OF_TRAINING = ("steps", "warmup_steps", "learning_rate", "min_learning_rate")


@dataclass(frozen=True)
class Part:
    """One stage of a run. overrides: what the run's own are followed by; step: from 1, None outside of the steps."""

    stage: str
    overrides: tuple[str, ...] = ()
    step: int | None = None


def expand(config: Config, stages: Sequence[str]) -> list[Part]:
    """The stages, in their order, with the steps in their place. Without iterate.students each stage is one part."""
    parts: list[Part] = []
    last = len(config.iterate.students)
    for stage in stages:
        if not last or stage not in ("prune", "distil"):
            parts.append(Part(stage))
            continue
        if stage == "prune":
            parts += [_part(config, name, step) for step in range(1, last) for name in ("prune", "distil")]
        parts.append(_part(config, stage, last))
    return parts


def step_directory(config: Config, step: int) -> Path:
    """Where a step's prune and distil lie; the last step's are the run's own."""
    return [*artifacts.earlier_steps(config), artifacts.run_directory(config)][step - 1]


def _part(config: Config, stage: str, step: int) -> Part:
    entry, last = config.iterate.students[step - 1], len(config.iterate.students)
    first = artifacts.teacher_directory(config)
    start = first if step == 1 else step_directory(config, step - 1) / "distil" / "hf"
    teaches = start if stage == "prune" or config.iterate.teacher is StepTeacher.previous else first
    settings: dict[str, Any] = {
        "iterate.students": [],
        "data.corpus": artifacts.corpus_directory(config),
        "teacher.mode": "take",
        "model.path": teaches,
        "student.drop_layers": entry.drop_layers,
        **{f"student.{name}": getattr(entry, name) for name in PRUNED_SIZES},
        **{f"prune.target.{name}": getattr(entry, name) for name in LIMITS},
    }
    if step < last:
        settings["run.name"] = f"{config.run.name}/step{step}"
    if step > 1:
        settings["prune.scores"] = None  # of the first teacher
    given = {name: getattr(entry, name) for name in OF_TRAINING}
    settings |= {f"distil.{name}": value for name, value in given.items() if value is not None}
    return Part(stage, tuple(f"{name}={_written(value)}" for name, value in settings.items()), step)


def _written(value: Any) -> str:
    """A value in Hydra's syntax."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, str | Path):
        return "'" + str(value).replace("'", "\\'") + "'"
    return str(value)


# What can be said of the steps before anything of them is there


def shapes(config: Config) -> list[ModelShape]:
    """The first teacher's shape and each student's. Raises UserError where an entry contradicts itself."""
    found = [planning.teacher_shape(config)]
    for step in range(1, len(config.iterate.students) + 1):
        found.append(student_shape(config, step, found[-1]))
    return found


def student_shape(config: Config, step: int, start: ModelShape) -> ModelShape:
    """What a step makes of a start of this shape; where it is searched for, the largest that it may be."""
    view = pruning_view(config, step, start)
    if searches(view):
        return grid.candidates(view, layout(view.parallel), start)[0][0].shape
    return planning.target_shape(start, view.student)


def pruning_view(config: Config, step: int, start: ModelShape) -> Config:
    """The settings of an ordinary run that prunes what the step starts from, by shapes alone."""
    entry = config.iterate.students[step - 1]
    sizes = {name: getattr(entry, name) for name in PRUNED_SIZES}
    view = _view(config, step, start, StudentConfig(drop_layers=entry.drop_layers, **sizes))
    view.prune.target = TargetConfig(**{name: getattr(entry, name) for name in LIMITS})
    return view


def distillation_view(config: Config, step: int, models: Sequence[ModelShape]) -> Config:
    """The settings of an ordinary run that distils as the step does, by shapes alone: of the first teacher and of the
    students up to this step's."""
    teacher = models[step - 1] if config.iterate.teacher is StepTeacher.previous else models[0]
    view = _view(config, step, teacher, _whole(models[step]))
    view.prune.depth_method, view.prune.protect = DepthMethod.block_influence, ProtectConfig()
    return view


def final_view(config: Config) -> Config:
    """The run as its first teacher and last student alone show it, with its own paths."""
    view = copy.deepcopy(config)
    view.student, view.prune.depth_method = _whole(shapes(config)[-1]), DepthMethod.block_influence
    return view


def _view(config: Config, step: int, teacher: ModelShape, student: StudentConfig) -> Config:
    view, entry = copy.deepcopy(config), config.iterate.students[step - 1]
    view.iterate = IterateConfig()
    view.run.name = f"{config.run.name}, step {step} of {len(config.iterate.students)}"
    view.model.path, view.student = None, student
    view.model.shape = ShapeConfig(**{field.name: getattr(teacher, field.name) for field in fields(ShapeConfig)})
    for name in OF_TRAINING:
        if (value := getattr(entry, name)) is not None:
            setattr(view.distil, name, value)
    return view


def _whole(shape: ModelShape) -> StudentConfig:
    return StudentConfig(**{name: getattr(shape, name) for name in PRUNED_SIZES})

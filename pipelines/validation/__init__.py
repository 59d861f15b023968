"""Every check of a configuration that needs nothing heavy, before anything is built or started. Imports no torch.

`validate` raises UserError with expected, found and remedy, and returns warnings for settings without effect. What is
checked depends on the stages asked for: `plan` needs no file of the teacher, `distil` no source of the corpus. Ranks
that another launcher started pass here too, so that a stage need not check its settings again.
"""

from collections.abc import Collection
from dataclasses import replace

from pipelines import artifacts, iteration, planning
from pipelines.config import Config, Layout, ParallelConfig, UserError, layout, searches
from pipelines.families import ModelShape, read_shape
from pipelines.stages import STAGES
from pipelines.validation import (
    benchmark,
    data,
    depth,
    directories,
    documents,
    effects,
    efficiency,
    export,
    frozen_teacher,
    gates,
    layouts,
    memory,
    numbers,
    report,
    scores,
    search,
    shapes,
    signals,
    site,
    steps,
    tasks,
    texts,
    training,
)

# On ranks, on the run's models; verify makes shapes to fit the layout, and the benchmark has models of its own.
RANKED = frozenset(name for name, stage in STAGES.items() if stage.ranks) - {"verify", "benchmark"}

DIVIDED = RANKED | {"plan"}  # the run's models, on its layout: plan counts no step that distil would refuse

WITH_STUDENT = frozenset({"plan", "prune", "distil", "evaluate", "export"})


def validate(config: Config, stages: Collection[str]) -> list[str]:
    """stages: the names that are asked for. Returns warnings; raises UserError. Of a run in steps every step is checked
    before the first."""
    numbers.check(config)
    site.check_secrets(config)
    gates.check(config)
    if not config.iterate.students:
        if set(stages) == {"plan"} and layout_refusal(config):
            return []  # the plan tells it beside its table
        return _validate(config, stages)
    steps.check(config, stages)
    found = []
    for place, pruning, distillation in steps.views(config, stages):
        with steps.named(place):
            found += [f"iterate.students[{place}]: {warning}" for warning in _validate(pruning, ["plan"])]
            _validate(distillation, ["plan"])
            trained = steps.stages_with(config, stages, place)
            training.check(
                distillation, trained & {"distil"}, layout(config.parallel), distillation.model.shape.vocab_size
            )
    return found + _validate(iteration.final_view(config), steps.stages_with(config, stages))


def layout_refusal(config: Config) -> UserError | None:
    """What speaks against the layout of a plan that lists others (plan.layouts); None where nothing does. Raises
    UserError for what another layout does not mend."""
    if not config.plan.layouts or searches(config):  # a search needs the layout to find the student's shape
        return None
    try:
        _validate(config, ["plan"])
    except UserError as error:
        alone = ParallelConfig(processes=1, tensor=1, device=config.parallel.device)
        _validate(replace(config, parallel=alone), ["plan"])
        return error
    return None


def _validate(config: Config, stages: Collection[str]) -> list[str]:
    ranks = layout(config.parallel)
    if any(STAGES[name].takes_all_nodes for name in stages):
        layouts.check_processes(ranks)
    report.check(config, stages)
    site.check(config, stages)
    site.check_acceptance(config, stages)
    directories.check_run(config, stages)
    directories.check_given(config, stages)
    directories.check_kept(config, stages)
    export.check(config, stages)
    efficiency.check(config, stages)
    data.check_sources(config, stages)
    teacher, where = planning.teacher_shape(config), config.model.path or "model.shape"
    if "teacher" not in stages and RANKED & set(stages):
        made = artifacts.teacher_directory(config)  # what these stages read, whatever the settings say by now
        if artifacts.is_hugging_face(made):
            teacher, where = read_shape(made), str(made)
    students = _students(config, stages, ranks, teacher)
    student, used = students[0], search.stages_with(config, stages)
    if DIVIDED & set(stages):
        layouts.check_division(ranks, teacher, "teacher")
    if WITH_STUDENT & DIVIDED & set(stages):
        layouts.check_division(ranks, student, "student")
    layouts.check_gpu(config, stages)
    layouts.check_context(config, used, ranks, teacher)
    for name, length in layouts.lengths(config, used):
        layouts.check_length(name, length, ranks, teacher)
    texts.check(config, stages, ranks, teacher)
    training.check(config, used, ranks, teacher.vocab_size)
    frozen_teacher.check(config, used, ranks, teacher)
    memory.check(config, used, ranks, teacher, student)
    benchmark.check(config, stages, ranks)
    for shape in students:
        with search.named(config, shape):
            signals.check(config, used, ranks, teacher, shape)
    depth.check(config, stages, teacher, min(shape.num_hidden_layers for shape in students))
    data.check_tokenizer(config, stages, teacher, where)
    data.check_splits(config, stages, teacher)
    documents.check(config, used, ranks)
    directories.check_weights(config, stages)
    scores.check(config, stages, teacher)
    tasks.check(config, stages)
    return [
        *directories.warnings(config, stages),
        *effects.warnings(config, ranks, stages, teacher, student),
        *export.warnings(config, stages),
        *tasks.warnings(config, stages),
    ]


def _students(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape) -> list[ModelShape]:
    """The shape of the student that the stages make or read; where it is yet to be found, shapes that stand for all it
    may be, the largest first. Raises UserError where it cannot be the teacher's, unless evaluate alone reads it, where
    it is a gap (evaluation/fitting.py)."""
    try:
        return _shapes_of_student(config, stages, ranks, teacher)
    except UserError:
        if WITH_STUDENT & set(stages) == {"evaluate"}:
            return [teacher]
        raise


def _shapes_of_student(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape) -> list[ModelShape]:
    start = artifacts.student_start_directory(config)
    if config.student.path and artifacts.is_hugging_face(start):
        student = read_shape(start)
        shapes.check_given_student(config, teacher, student)
        return [student]
    if not {"plan", "prune"} & set(stages) and artifacts.is_hugging_face(start):
        return [read_shape(start)]  # what an earlier prune made, whatever the settings say by now
    student = planning.target_shape(teacher, config.student)
    if WITH_STUDENT & set(stages):
        if searches(config):
            found = search.representatives(search.check(config, ranks, teacher))
            for shape in found:
                with search.named(config, shape):
                    shapes.check_target(config, ranks, teacher, shape)
            return found
        shapes.check_target(config, ranks, teacher, student)
    return [student]

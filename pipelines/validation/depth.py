"""Methods that choose layers by measuring what their removal costs."""

from collections.abc import Collection, Iterator

from pipelines import protection, questions
from pipelines.choices import BY_REMOVAL, DepthMethod, Measure
from pipelines.config import Config, expect, searches
from pipelines.families import ModelShape
from pipelines.prune_costs import blocks
from pipelines.scores_origin import measures_removals


def check(config: Config, stages: Collection[str], teacher: ModelShape, layers: int) -> None:
    """What these methods need. layers: the fewest that may stay. Raises UserError."""
    settings, student = config.prune, config.student
    if "prune" not in stages or student.path or not measures_removals(config):
        return
    method = f"prune.depth_method={settings.depth_method.value}"
    expect(
        student.num_hidden_layers is not None or searches(config),
        "student.num_hidden_layers",
        f"the number of layers that stay with {method}",
        "none",
        "Set it, or set prune.depth_method=block_influence.",
    )
    if settings.depth_measure is Measure.task:
        remedy = "Give a JSONL file of questions, or set prune.depth_measure=loss."
        expect(bool(settings.task), "prune.task", f"questions with {method} by task", "none", remedy)
    if settings.task:
        questions.check(config, teacher)
    drop = teacher.num_hidden_layers - layers
    if settings.depth_method is DepthMethod.contiguous and drop > 0:
        protected = protection.protected(settings.protect).all_layers
        every = teacher.num_hidden_layers
        longest = max(length for length in range(every + 1) if blocks(every, length, protected))
        expect(
            longest >= drop,
            "prune.protect",
            f"{drop} neighbouring layers that it does not name, with {method}",
            f"at most {longest}",
            "Protect fewer, keep more layers, or set prune.depth_method=greedy.",
        )


def warnings(config: Config, teacher: ModelShape) -> Iterator[str]:
    """Settings without effect on the choice of layers. For a run of the prune stage."""
    settings, student = config.prune, config.student
    method = f"prune.depth_method={settings.depth_method.value}"
    measured = settings.depth_method in BY_REMOVAL
    if student.drop_layers and settings.depth_method not in (DepthMethod.layers, DepthMethod.block_influence):
        yield f"{method} has no effect with student.drop_layers"
        measured = False
    elif measured and student.num_hidden_layers == teacher.num_hidden_layers:
        yield f"{method} has no effect: every layer stays"
    by_task = measured and settings.depth_measure is Measure.task
    if settings.depth_measure is Measure.task and not measured:
        yield "prune.depth_measure=task has no effect without prune.depth_method=loss, contiguous or greedy"
    if settings.depth_samples is not None:
        if not measured or by_task:
            yield "prune.depth_samples has no effect where no removal's loss is measured"
        elif settings.depth_samples >= settings.calibration_samples:
            samples = settings.calibration_samples
            yield f"prune.depth_samples={settings.depth_samples} has no effect beyond calibration_samples={samples}"
    if settings.task and not by_task and settings.search.by is not Measure.task:
        yield "prune.task has no effect without prune.depth_measure=task or prune.search.by=task"
    if settings.task_normalised and not settings.task:
        yield "prune.task_normalised has no effect without prune.task"

"""A run in steps: every student against the one before, before the first step starts."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pipelines import iteration, planning
from pipelines.config import Config, UserError, expect
from pipelines.prune_settings import PRUNED_SIZES, ProtectConfig

IN_STEPS = frozenset({"plan", "prune", "distil"})


def check(config: Config, stages: Collection[str]) -> None:
    """What has no meaning over several students."""
    student, remedy = config.student, "Leave it out (student=custom): iterate.students has the shapes."
    for name in (*PRUNED_SIZES, "drop_layers", "path"):
        value = getattr(student, name)
        expect(value is None, f"student.{name}", "none beside iterate.students", value, remedy)
    limits = {name: value for name, value in vars(config.prune.target).items() if value is not None}
    remedy = "Give each of iterate.students its parameters or ratio."
    expect(not limits, "prune.target", "none beside iterate.students", ", ".join(limits), remedy)
    remedy = "It is the control of one student: leave it or iterate.students out."
    expect(not config.prune.random_weights, "prune.random_weights", "false with iterate.students", "true", remedy)
    several, protect = len(config.iterate.students) > 1, config.prune.protect
    expected = "nothing beside several iterate.students, each of which is numbered anew"
    remedy = "Protect in runs of one step, each with model.path at the student before."
    expect(not several or protect == ProtectConfig(), "prune.protect", expected, "some", remedy)


def stages_with(config: Config, stages: Collection[str], step: int = 0) -> frozenset[str]:
    """The stages, and distil where prune makes the students before the last: from the step at this place on."""
    follows = "prune" in stages and step < len(config.iterate.students) - 1
    return frozenset(stages) | ({"distil"} if follows else frozenset())


def views(config: Config, stages: Collection[str]) -> Iterator[tuple[int, Config, Config]]:
    """(place in iterate.students, settings of ordinary runs that prune and that distil as the step does)."""
    models = [planning.teacher_shape(config)]
    for step in range(1, len(config.iterate.students) + 1) if IN_STEPS & set(stages) else ():
        with named(step - 1):
            models.append(iteration.student_shape(config, step, models[-1]))
        pruning = iteration.pruning_view(config, step, models[-2])
        yield step - 1, pruning, iteration.distillation_view(config, step, models)


@contextmanager
def named(place: int) -> Iterator[None]:
    """A mistake inside names the student that it belongs to."""
    try:
        yield
    except UserError as error:
        raise UserError(f"iterate.students[{place}]: {error}") from None

"""Whether a training fits into the memory of the devices that it is for: refused on GPUs, a warning of the plan.

What activations.py leaves out comes on top of what is counted, so a training that does not fit by this cannot run.
"""

from collections.abc import Collection, Iterator

from pipelines import elsewhere, gpus, nvidia_smi, planning
from pipelines.config import Config, DistilConfig, Layout, TeacherMode, TrainingConfig, UserError
from pipelines.device_memory import training_bytes
from pipelines.families import ModelShape
from pipelines.validation.training import trainings

REMEDY = "Use more tensor parallelism, recompute or a smaller micro batch; stage=plan plan.layouts=true lists layouts."


def check(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape, student: ModelShape) -> None:
    """Before a stage that trains on this machine's GPUs; a login node does not know those of others. Raises UserError
    with the bytes of each kind."""
    trained = list(trainings(config, stages))
    here = ranks.device == "cuda" and elsewhere.gpus() is None
    memory = nvidia_smi.smallest_memory() if here and trained else None
    if memory is None:
        return
    for name, training in trained:
        parts = _parts(training, ranks, teacher, student)
        if parts["total"] > memory:
            raise UserError(
                f"parallel: expected {name} to fit into the {memory:,} bytes of a GPU of this machine, found "
                f"{parts['total']:,} by plan: {_listed(parts)}. {REMEDY}"
            )


def warnings(config: Config, teacher: ModelShape, student: ModelShape) -> Iterator[str]:
    """Of the plan, against plan.gpu."""
    name = gpus.named_gpu(config.plan.gpu)
    planned = planning.planned_layout(config)
    if name is None or planned.device != "cuda":
        return
    stages = {"distil"} if config.teacher.mode is TeacherMode.take else {"distil", "teacher"}
    for stage, training in trainings(config, stages):
        parts = _parts(training, planned, teacher, student)
        if parts["total"] > gpus.MEMORY[name]:
            yield (
                f"{stage}: {parts['total']:,} bytes per device do not fit the {gpus.MEMORY[name] / 1e9:g} GB of a "
                f"{name} (plan.gpu): {_listed(parts)}. {REMEDY}"
            )


def _parts(training: TrainingConfig, ranks: Layout, teacher: ModelShape, student: ModelShape) -> dict[str, int]:
    if not isinstance(training, DistilConfig):
        return training_bytes(teacher, ranks, training)
    return planning.step_bytes(training, teacher, student, ranks)


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in parts.items() if size and name != "total")

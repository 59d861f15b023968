"""What changes over training, at Lightning's hooks and in its checkpoints."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from pipelines.model.course import Course
from pipelines.trainer.callbacks import Metrics
from pipelines.trainer.module import unwrap


class CourseCallback(Callback):
    """Sets what the course says before each step and tells it how the step went. Its figures join the step's own."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.course.begin(unwrap(pl_module.module), trainer.global_step)  # type: ignore[arg-type]

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self._metrics(trainer).means |= self.course.figures

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        metrics = self._metrics(trainer)
        if not metrics.guard.reason:  # a step that was left out says nothing of the course
            self.course.end(metrics.means, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return self.course.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.course.load_state_dict(state_dict)

    def _metrics(self, trainer: Any) -> Metrics:
        return next(callback for callback in trainer.callbacks if isinstance(callback, Metrics))

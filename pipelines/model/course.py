"""What of the loss changes over training: weights, temperature and TAID's t, set on the pair before every step."""

from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.core.loss import LossWeights
from pipelines.core.schedules import AdaptiveInterpolation, Schedule
from pipelines.model.pair import DistillationPair


@dataclass
class Course:
    """weights: those of the first step. kd, ce, temperature, features: their schedules, None where nothing changes.

    Every rank has one and takes the same steps with the same means: there are no collectives.
    """

    weights: LossWeights
    kd: Schedule | None = None
    ce: Schedule | None = None
    temperature: Schedule | None = None
    features: Schedule | None = None
    taid: AdaptiveInterpolation | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def begin(self, pair: DistillationPair, step: int) -> None:
        """Set what holds in optimizer step `step`, counted from 0; `figures` tells what changes."""
        scheduled = {"kd": self.kd, "ce": self.ce, "temperature": self.temperature}
        values: dict[str, Any] = {name: schedule.value(step) for name, schedule in scheduled.items() if schedule}
        pair.weights = replace(self.weights, **values)
        self.figures = {f"{name}_weight" if name != "temperature" else name: value for name, value in values.items()}
        if self.features is not None and pair.features is not None:
            pair.features.factor = self.figures["features_factor"] = self.features.value(step)
        if self.taid is not None:
            pair.teacher_share = self.figures["taid_t"] = self.taid.t

    def end(self, means: dict[str, float], steps: int) -> None:
        """After `steps` optimizer steps: means are those of the last one over the global batch."""
        if self.taid is not None and "kd" in means:
            self.taid.update(means["kd"], steps)

    def state_dict(self) -> dict[str, Any]:
        return {"taid": self.taid.state_dict()} if self.taid is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.taid is not None:
            self.taid.load_state_dict(state["taid"])

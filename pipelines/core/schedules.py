"""Numbers that change over training: weights and temperature by the step alone, TAID's t by the loss as well.

What depends on the loss must be computed from the mean over the global batch, which every rank has to the last bit, and
its state belongs into the checkpoint: computed from each rank's own loss, the ranks drift apart.
"""

import math
from dataclasses import dataclass, field
from typing import Any

SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` over `steps` steps that begin after `first_step` of them; `start` before, `end` afterwards.

    shape: "constant" (start, always), "linear", or "cosine" (half a period: flat at both ends). Steps count from 0, the
    first optimizer step.
    """

    start: float
    end: float
    steps: int
    shape: str = "linear"
    first_step: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"schedule: expected one of {', '.join(SHAPES)}, found {self.shape}.")
        if self.steps < 1 or self.first_step < 0:
            raise ValueError(
                f"schedule: expected 1 or more steps from step 0 or later, found {self.steps} from {self.first_step}."
            )

    def value(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        done = min(max((step - self.first_step) / self.steps, 0.0), 1.0)
        if self.shape == "constant" or done == 0.0:
            return self.start
        if done == 1.0:
            return self.end
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * share

    @property
    def changes(self) -> bool:
        return self.shape != "constant" and self.start != self.end


@dataclass
class AdaptiveInterpolation:
    """TAID's t, the teacher's share of the target softmax((1 - t) * student + t * teacher) (arXiv 2501.16937, alg. 1).

    After optimizer step n of N with loss J_n, the KL of the interpolated target and the student:

        change   = (J_(n-1) - J_n) / J_(n-1)
        momentum = beta * momentum + (1 - beta) * change
        t        = min(end, max(start + (end - start) * n / N, t + alpha * sigmoid(momentum) * (1 - t)))

    so that t never falls and never lags behind the line from start to end. The first loss is remembered only, and one
    that is not finite changes nothing.
    """

    steps: int
    start: float = 0.4
    end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    t: float = field(init=False)
    momentum: float = field(default=0.0, init=False)
    previous_loss: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1 or not 0 <= self.alpha <= 1 or not 0 <= self.beta < 1 or self.steps < 1:
            raise ValueError(
                "TAID: expected 0 <= start <= end <= 1, alpha from 0 to 1, momentum from 0 to below 1 and 1 or more "
                f"steps, found start={self.start}, end={self.end}, alpha={self.alpha}, momentum={self.beta}, "
                f"steps={self.steps}."
            )
        self.t = self.start

    def update(self, loss: float, step: int) -> float:
        """loss: the mean over the global batch, the same on every rank; step: optimizer steps done. Returns the new t.

        No collectives: equal arguments give equal states.
        """
        if not math.isfinite(loss):
            return self.t
        raised = self.t
        if self.previous_loss is not None:
            change = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * change
            raised += self.alpha * _sigmoid(self.momentum) * (1 - self.t)
        self.previous_loss = loss
        line = self.start + (self.end - self.start) * min(step / self.steps, 1.0)
        self.t = min(self.end, max(line, raised))
        return self.t

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "momentum": self.momentum, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.momentum, self.previous_loss = state["t"], state["momentum"], state["previous_loss"]


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return (1 + math.tanh(x / 2)) / 2

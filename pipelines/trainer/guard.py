"""Whether a step may change the weights: one whose numbers are not finite, or whose gradient is a spike, is left out.

A step that is left out has consumed its data and counts as a step of the schedule. It changes neither the weights nor
what the optimizer keeps.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

from pipelines import console, stopping
from pipelines.trainer.finite import SharedError, on_any_rank, refuse

WINDOW = 128  # steps taken, over whose gradient norms the median runs
FEWEST = 16  # of them, before any norm is called a spike
_STOP, _SPIKE, _WRITES = "stop", "spike", "writes"  # beside what is not finite


class LeftOut(Exception):
    """In place of the optimizer's step."""


class Guard:
    """Judges each step before the optimizer's, the same on every rank.

    most: how many steps of the whole run may be left out. spike: the multiple of the running median of gradient norms
    above which one is a spike; None: none is. reason: why the step at hand is left out, empty where it is not. stops:
    whether the run was asked to stop with it. left_out: how many steps were so far, over resumes.

    is_writing: whether this rank writes files of a checkpoint at the moment; writes: whether any rank did.
    """

    def __init__(
        self,
        description: str,
        *,
        most: int = 0,
        spike: float | None = None,
        is_writing: Callable[[], bool] = lambda: False,
    ) -> None:
        self.description, self.most, self.spike, self.is_writing = description, most, spike, is_writing
        self.stops, self.writes, self.reason, self.left_out = False, False, "", 0
        self.norms: list[float] = []

    def judge(self, loss: float, gradient_norm: float, step: int) -> None:
        """Set stops, writes and reason for step `step`, counted from 1. One MAX all-reduce over all ranks.

        Raises the same SharedError on every rank where no more steps may be left out.
        """
        flags = {name: not math.isfinite(value) for name, value in (("loss", loss), ("gradient norm", gradient_norm))}
        bound = self.spike * statistics.median(self.norms) if self.spike and len(self.norms) >= FEWEST else math.inf
        flags |= {_SPIKE: gradient_norm > bound, _STOP: stopping.asked(), _WRITES: self.is_writing()}
        found = on_any_rank(flags)
        self.stops, self.writes = _STOP in found, _WRITES in found
        unknown = sorted(found - {_STOP, _SPIKE, _WRITES})
        self.reason = f"a {' and a '.join(unknown)} that is not finite" if unknown else ""
        if _SPIKE in found and not unknown:
            self.reason = f"a gradient norm of {gradient_norm:.4g}, above spike={self.spike:g} times the median"
        if self.reason:
            self._leave_out(unknown, step)
        elif self.spike:
            self.norms = [*self.norms[1 - WINDOW :], gradient_norm]

    def _leave_out(self, unknown: list[str], step: int) -> None:
        if self.left_out >= self.most:
            if not self.most:
                refuse(unknown, step)
            raise SharedError(
                f"{self.description}: expected at most skip_steps={self.most} steps to be left out, found step {step} "
                f"besides: {self.reason}. The last checkpoint is from before it. Start the stage again with a lower "
                "learning rate and overwrite=true, or with a higher skip_steps to continue from the checkpoint."
            )
        self.left_out += 1
        console.say(f"{self.description}  leaves out step {step}: {self.reason} ({self.left_out} of {self.most})")

    def figures(self) -> dict[str, Any]:
        """For the step's row of metrics.jsonl; nothing where no step may be left out."""
        found: dict[str, Any] = {"skipped_steps": self.left_out} if self.most else {}
        return found | ({"skipped": self.reason} if self.reason else {})

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": self.left_out, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left_out, self.norms = state["left_out"], state["norms"]

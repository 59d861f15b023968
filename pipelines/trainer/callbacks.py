"""What happens beside the training step: figures, progress, and stopping where numbers are not finite."""

import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from pipelines import console, files, planning, processes
from pipelines.model.measure import process_peak_bytes, resident_bytes
from pipelines.model.step import Totals, reduce_reports
from pipelines.trainer.finite import refuse_non_finite
from pipelines.trainer.guard import Guard
from pipelines.trainer.module import unwrap
from pipelines.trainer.trackers import Trackers


class Metrics(Callback):
    """Writes metrics.jsonl, and the same to trackers, on rank 0 and moves the progress bar.

    Rows: step, split, every mean of model/step.py's Totals, gradient_norm of the last training step (before clipping),
    and planning.speed_figures of the training steps since the last row of that split or the last validation. For train
    also learning_rate, time (seconds since the stage first started, over resumes), step_seconds, the mean since the row
    before, and memory_bytes, of rank 0 alone at the step's end: tensors on its GPU, or on a CPU the resident memory of
    the process; for validation peak_bytes
    (measure.process_peak_bytes). Rows past start, the step of the checkpoint that the run continues from, are taken
    back. A step that is left out (trainer/guard.py) has a row whatever the interval, with "skipped", its reason, and
    without what is not finite; where steps may be left out, "skipped_steps" counts them.

    In the first row after a start seconds_to_first_step, from the command to the end of that step. In every train row
    checkpoint_seconds, of saving up to it, over resumes like time, which they are part of; data_hash, of the rows of
    tokens that the step has consumed (model/windows.py).

    trackers: where rows go besides. guard: judges every step. saving_seconds: since this start. flops_per_token: of
    training. peak: FLOP/s of all devices together, None where that is not known.
    """

    def __init__(
        self,
        directory: Path,
        trackers: Trackers,
        guard: Guard,
        saving_seconds: Callable[[], float],
        *,
        description: str,
        start: int,
        steps: int,
        tokens_per_step: int,
        log_interval: int,
        flops_per_token: int,
        peak: float | None,
        share_of_peak: float = planning.SHARE_OF_PEAK,
    ) -> None:
        self.directory, self.trackers, self.guard, self.saving_seconds = directory, trackers, guard, saving_seconds
        self.description, self.start, self.steps = description, start, steps
        self.log_interval = log_interval
        self.speed = partial(
            planning.speed_figures, flops_per_token=flops_per_token, peak=peak, share_of_peak=share_of_peak
        )
        self.paces = {split: _Pace(tokens_per_step) for split in ("train", "validation")}
        self.elapsed = self.saved = 0.0  # seconds before this start
        self.seconds_to_first_step, self._told = 0.0, False
        self.data_hash = ""
        self.gradient_norm = 0.0
        self.means: dict[str, float] = {}
        self.validation: Totals | None = None
        self.last_validation: dict[str, float] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Here and not at the first step: a run that continues from its last step takes none.
        if console.rank() == 0:
            self.elapsed, self.saved, self._logged = _take_back_rows(self.directory / "metrics.jsonl", self.start)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.global_step == self.start, "the checkpoint's name tells its step"
        self._features = unwrap(pl_module.module).features
        self._started = time.monotonic()
        self._set_off(trainer.global_step)
        if console.rank() == 0:
            self.trackers.open(trainer.global_step, self._logged)
            if not trainer.global_step:
                self.trackers.show(unwrap(pl_module.module))
            self._file = open(self.directory / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 open for the whole run
        self._bar = console.progress(self.description, self.steps, "steps").__enter__()
        self._bar.advance(trainer.global_step)

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any = None) -> None:
        """NeMo calls it on every rank, once per global batch. Collectives: those of `reduce_reports`."""
        totals = reduce_reports(microbatch_outputs, self._features)
        self.means, self.data_hash = totals.means(), f"{totals.rows:013x}"
        if step.forward_only:
            self.validation = totals if self.validation is None else self.validation + totals

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # At the step's end the schedule has moved on already.
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The norm of the whole gradient, and the guard's judgement of the step.

        Before the step, so that the weights stay as they were; by itself, because Megatron leaves the norm out where
        nothing is to be clipped. One more pass over the gradients and one all-reduce beside that of the norm.
        """
        megatron = optimizer.mcore_optimizer
        megatron.prepare_grads()  # its own step begins with it; a second time changes nothing
        self.gradient_norm = float(megatron.get_grad_norm())
        self.guard.judge(self.means["loss"], self.gradient_norm, trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step, means = trainer.global_step, self.means
        if not self.seconds_to_first_step:
            self.seconds_to_first_step = processes.seconds_since_start()
        if step % self.log_interval and step != self.steps and not self.guard.reason:
            return
        tokens_per_second = self.paces["train"].since(step)
        self.paces["train"].set_off(step)
        row = means | {"learning_rate": self._learning_rate, "gradient_norm": self.gradient_norm}
        row |= self.speed(tokens_per_second) | self.costs()
        row |= {
            "step_seconds": self.paces["train"].tokens_per_step / tokens_per_second,
            "memory_bytes": _memory_bytes(),
        }
        if not self._told:
            self._told, row["seconds_to_first_step"] = True, self.seconds_to_first_step
        row = {name: value for name, value in row.items() if not self.guard.reason or math.isfinite(value)}
        self._write(step, "train", row | self.guard.figures() | {"data_hash": self.data_hash})
        shown = "  ".join(f"{name} {means[name]:.3f}" for name in ("loss", "kd", "ce") if name in means)
        speed = f"{tokens_per_second:,.0f} tokens/s  {_in_words(row['flops_per_second'])}"
        planned = f"  {row['percent_of_plan']:.0f} % of plan" if "percent_of_plan" in row else ""
        self._bar.advance(step - self._bar.done, f"{shown}  {speed}{planned}")

    def costs(self) -> dict[str, float]:
        """Seconds of training so far, over resumes, and those of saving that are part of them. On rank 0."""
        return {
            "time": self.elapsed + time.monotonic() - self._started,
            "checkpoint_seconds": self.saved + self.saving_seconds(),
        }

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validation = None
        self._training_speed = self.speed(self.paces["validation"].since(trainer.global_step))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.validation is not None
        self.last_validation = self.validation.means()
        refuse_non_finite({"validation loss": math.isfinite(self.last_validation["loss"])}, trainer.global_step)
        beside = {
            "gradient_norm": self.gradient_norm,  # of the step before
            "peak_bytes": process_peak_bytes(torch.device(torch.cuda.current_device())),
        }
        self._write(trainer.global_step, "validation", self.last_validation | self._training_speed | beside)
        self._set_off(trainer.global_step)

    def _set_off(self, step: int) -> None:
        """From here on is training: the time of a validation is not the next step's."""
        for pace in self.paces.values():
            pace.set_off(step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close(finished=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not files.is_disk_error(exception):  # TensorBoard would wait for what it cannot write
            self._close(finished=False)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # The rows before a checkpoint survive what the checkpoint survives.
        if console.rank() == 0:
            os.fsync(self._file.fileno())

    def state_dict(self) -> dict[str, Any]:
        return {"last_validation": self.last_validation, "guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_validation = state_dict["last_validation"]
        if "guard" in state_dict:  # checkpoints from before it was
            self.guard.load_state_dict(state_dict["guard"])

    def _write(self, step: int, split: str, figures: dict[str, Any]) -> None:
        if console.rank() != 0:
            return
        self._file.write(json.dumps({"step": step, "split": split, **figures}) + "\n")
        self.trackers.log(split, {n: v for n, v in figures.items() if not isinstance(v, str)}, step)

    def _close(self, finished: bool) -> None:
        if hasattr(self, "_bar"):
            self._bar.__exit__()
        if hasattr(self, "_file"):
            self._file.close()
            self.trackers.close(finished)


def _memory_bytes() -> int:
    device = torch.device(torch.cuda.current_device())
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()


def _in_words(flops_per_second: float) -> str:
    unit, name = (1e12, "TFLOP/s") if flops_per_second >= 1e12 else (1e9, "GFLOP/s")
    value = flops_per_second / unit
    return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"


def _take_back_rows(path: Path, step: int) -> tuple[float, float, dict[str, int]]:
    """Remove the rows after `step`, which will be written again.

    Returns the seconds of training and of saving that the last kept row tells, and the last step of each split that
    there was before.
    """
    if not path.exists():
        return 0.0, 0.0, {}
    rows = [row for line in path.read_text().splitlines() if (row := _parsed(line)) is not None]
    logged: dict[str, int] = {}
    for row in rows:
        logged[row["split"]] = max(row["step"], logged.get(row["split"], 0))
    kept = [row for row in rows if row["step"] <= step]
    files.write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
    seconds, saving = (max((row.get(n, 0.0) for row in kept), default=0.0) for n in ("time", "checkpoint_seconds"))
    return seconds, saving, logged


def _parsed(line: str) -> dict[str, Any] | None:
    """The row; None for one that a kill cut in two."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if "step" in row else None


class _Pace:
    """Tokens per second since a step."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step

    def set_off(self, step: int) -> None:
        self.step, self.moment = step, time.monotonic()

    def since(self, step: int) -> float:
        return self.tokens_per_step * (step - self.step) / (time.monotonic() - self.moment)

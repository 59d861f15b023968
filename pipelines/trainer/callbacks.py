"""What happens beside the training step: figures, progress, checkpoints, and stopping where numbers are not finite."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from pipelines import console, files
from pipelines.config import UserError
from pipelines.model.step import reduce_reports

CHECKPOINT = "step-{:07d}"
_PARTIAL = "partial-"
_SIZES = "sizes.json"


class Metrics(Callback):
    """Writes metrics.jsonl and TensorBoard events on rank 0 and moves the progress bar.

    Rows: step, split, every averaged loss term, and for train learning_rate, gradient_norm, tokens_per_second, time
    (seconds since the stage first started, over resumes). After a resume, rows past the checkpoint are taken back.
    """

    def __init__(
        self, directory: Path, *, description: str, steps: int, tokens_per_step: int, log_interval: int
    ) -> None:
        self.directory, self.description, self.steps = directory, description, steps
        self.tokens_per_step, self.log_interval = tokens_per_step, log_interval
        self.elapsed = 0.0
        self.means: dict[str, float] = {}
        self.validation = _Sums()
        self.last_validation: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = self._previous = time.monotonic()
        self._previous_step = trainer.global_step
        if console.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.elapsed = _take_back_rows(self.directory / "metrics.jsonl", trainer.global_step)
            self._file = open(self.directory / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 open for the whole run
            self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=trainer.global_step + 1)
        self._bar = console.progress(self.description, self.steps, "steps").__enter__()
        self._bar.advance(trainer.global_step)

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any = None) -> None:
        """NeMo calls it on every rank, once per global batch. Collectives: those of `reduce_reports`."""
        self.means = reduce_reports(microbatch_outputs)
        if step.forward_only:
            self.validation.add(self.means)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # At the step's end the schedule has moved on already.
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step, means = trainer.global_step, self.means
        norm = trainer.callback_metrics.get("grad_norm")
        norm = float(norm) if norm is not None else None
        for what, value in (("loss", means["loss"]), ("gradient norm", norm)):
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"training: expected a finite {what}, found {value} at step {step}. No checkpoint was written "
                    "after it. Start the stage again with a lower learning rate and overwrite=true."
                )
        if step % self.log_interval and step != self.steps:
            return
        now = time.monotonic()
        tokens_per_second = self.tokens_per_step * (step - self._previous_step) / (now - self._previous)
        self._previous, self._previous_step = now, step
        row = means | {
            "learning_rate": self._learning_rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens_per_second,
            "time": self.elapsed + now - self._started,
        }
        self._write(step, "train", row)
        shown = "  ".join(f"{name} {means[name]:.3f}" for name in ("loss", "kd", "ce") if name in means)
        self._bar.advance(step - self._bar.done, f"{shown}  {tokens_per_second:,.0f} tokens/s")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validation = _Sums()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.last_validation = self.validation.means()
        self._write(trainer.global_step, "validation", self.last_validation)
        # The time of a validation is not the next step's.
        self._previous = time.monotonic()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {"last_validation": self.last_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_validation = state_dict["last_validation"]

    def _write(self, step: int, split: str, figures: dict[str, Any]) -> None:
        if console.rank() != 0:
            return
        figures = {name: value for name, value in figures.items() if value is not None}
        self._file.write(json.dumps({"step": step, "split": split, **figures}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def _close(self) -> None:
        if hasattr(self, "_bar"):
            self._bar.__exit__()
        if hasattr(self, "_file"):
            self._file.close()
            self._events.close()


class Checkpoints(Checkpoint):
    """Saves every `interval` steps and at the end into `directory`/step-NNNNNNN, and keeps the last `keep`.

    A checkpoint is written under another name and renamed when it is whole, so that every step-NNNNNNN can be loaded.
    It holds weights, optimizer, schedule and position in the data as NeMo distributed checkpoints, which load at any
    other layout; no classes are stored.
    """

    def __init__(self, directory: Path, *, interval: int, keep: int, steps: int) -> None:
        self.directory, self.interval, self.keep, self.steps = directory, interval, keep, steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Lightning counts a step as completed after `on_train_batch_end`: resumed from a checkpoint that was written
        # there, it would be one step behind, and so would every validation.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.current.completed = progress.total.completed = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # Where a validation follows, its figures belong to the checkpoint: a resumed run does not repeat it.
        if trainer.global_step % trainer.val_check_interval:
            self._save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        """Three barriers over all ranks beside Megatron's own collectives."""
        step = trainer.global_step
        if step % self.interval and step != self.steps:
            return
        partial = self.directory / (_PARTIAL + CHECKPOINT.format(step))
        if console.rank() == 0:
            for left_over in self.directory.glob(_PARTIAL + "*"):
                shutil.rmtree(left_over)
        torch.distributed.barrier()
        trainer.save_checkpoint(partial)
        torch.distributed.barrier()
        if console.rank() == 0:
            files.write_json(partial / _SIZES, _sizes(partial))
            target = self.directory / CHECKPOINT.format(step)
            if target.exists():  # a damaged one that this run did not continue from
                shutil.rmtree(target)
            os.replace(partial, target)
            for old in whole_checkpoints(self.directory)[: -self.keep]:
                shutil.rmtree(old)
        torch.distributed.barrier()


def whole_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that can be loaded, oldest first: those whose files have the sizes they were written with."""
    return [path for path in sorted(directory.glob("step-*")) if _is_whole(path)]


def _is_whole(checkpoint: Path) -> bool:
    recorded = checkpoint / _SIZES
    try:
        return json.loads(recorded.read_text()) == _sizes(checkpoint)
    except (OSError, json.JSONDecodeError):
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    """{relative path: bytes} of a checkpoint's files, without the record of them."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != _SIZES)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in found}


def _take_back_rows(path: Path, step: int) -> float:
    """Remove the rows after `step`, which will be written again; returns the seconds that the last kept row tells."""
    if not path.exists():
        return 0.0
    rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    files.write_atomic(path, "".join(row + "\n" for row in rows))
    return max((json.loads(row).get("time", 0.0) for row in rows), default=0.0)


def _step_of(line: str) -> float:
    """The row's step; infinity for a row that a kill cut in two."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


class _Sums:
    """Means of several global batches joined into one, weighted by their tokens."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self.totals: dict[str, float] = {}

    def add(self, means: dict[str, float]) -> None:
        self.tokens += means["tokens"]
        for name in means.keys() - {"tokens"}:
            self.totals[name] = self.totals.get(name, 0.0) + means[name] * means["tokens"]

    def means(self) -> dict[str, float]:
        return {name: total / self.tokens for name, total in self.totals.items()} | {"tokens": self.tokens}

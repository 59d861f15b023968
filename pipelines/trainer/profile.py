"""A trace of a few training steps, for TensorBoard's profiler plugin, Perfetto or chrome://tracing."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from pipelines import console
from pipelines.config import PROFILED

WARMUP = 2  # steps in which the profiler runs and keeps nothing: the first ones after it starts are slow


class Trace(Callback):
    """Traces steps config.PROFILED of rank 0, counted from 1 from where this start begins, once.

    The file, <directory>/rank0.<time>.pt.trace.json, has every operation on the CPU and, with device "cuda", every
    kernel, the memory of tensors, and the ranges that model/pair.py names; no stacks, which would slow it down. A
    validation between two of these steps is in it too. Other ranks do nothing.
    """

    def __init__(self, directory: Path, *, description: str, steps: int, device: str) -> None:
        self.directory, self.description, self.steps, self.device = directory, description, steps, device
        self.profiler: profile | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if console.rank() != 0:
            return
        first, self.last = (trainer.global_step + step for step in (PROFILED[0], PROFILED[-1]))
        if self.last > self.steps:
            console.say(f"{self.description}  no profile: fewer than {PROFILED[-1]} steps are left")
            return
        console.say(f"{self.description}  profile of steps {first} to {self.last}, rank 0: {self.directory}")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=PROFILED[0] - 1 - WARMUP, warmup=WARMUP, active=len(PROFILED), repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(self.directory), worker_name="rank0"),
            profile_memory=True,
        )
        self.profiler.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.profiler is None:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()  # a step's kernels belong to it
        self.profiler.step()  # after the last one it writes the file
        if trainer.global_step == self.last:
            self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.profiler is not None:
            self.profiler, profiler = None, self.profiler
            profiler.stop()

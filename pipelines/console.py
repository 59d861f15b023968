"""What the user sees: lines, tables and progress bars on the real terminal, while everything else goes to a log file.

NeMo, Lightning and Megatron write to stdout, stderr and the logging module as they like. `capture` moves both file
descriptors of the process into a log file and keeps a handle on the terminal for us. Only rank 0 speaks. No torch.
"""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.processes import rank

_terminal: TextIO | None = None


def terminal() -> Console:
    """The console of rank 0; other ranks get one that writes nowhere."""
    file = _terminal or sys.stdout
    width = None if file.isatty() else 120
    return Console(file=file, quiet=rank() != 0, highlight=False, width=width, soft_wrap=width is not None)


def say(message: str) -> None:
    terminal().print(message, markup=False)


def capture(log_file: Path) -> None:
    """Send this process's stdout and stderr, and those of every library in it, to log_file (appended)."""
    global _terminal
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if _terminal is None:
        sys.stdout.flush()
        _terminal = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.captureWarnings(True)


def progress(description: str, total: float | None, unit: str = "step") -> "Bar":
    return Bar(description, total, unit)


class Bar:
    """A progress bar with a rate and the time left; on a pipe or file, one line at most every 10 % instead.

    Use as a context manager. `advance(1, detail="loss 3.21  12,345 tokens/s")` moves it by units of work.
    """

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.console, self.total, self.unit, self.description = terminal(), total, unit, description
        self.done = 0.0
        self._printed = -1
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(description, total=total, detail="")
        self._live = self.console.is_terminal and rank() == 0

    def __enter__(self) -> "Bar":
        if self._live:
            self._progress.start()
        return self

    def advance(self, amount: float = 1, detail: str = "") -> None:
        self.done += amount
        self._progress.update(self._task, advance=amount, detail=detail)
        if self._live or rank() != 0 or not self.total:
            return
        tenth = int(10 * self.done / self.total)
        if tenth > self._printed:
            self._printed = tenth
            left = self._progress.tasks[0].time_remaining
            remaining = f"  {left:.0f} s left" if left else ""
            say(f"{self.description}  {self.done:,.0f}/{self.total:,.0f} {self.unit}  {detail}{remaining}")

    def __exit__(self, *args: object) -> None:
        if self._live:
            self._progress.stop()

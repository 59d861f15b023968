"""Megatron's index of samples, rebuilt where an earlier attempt was killed while it wrote it.

Megatron writes the index in place, also in a run that continues with other validation settings, and takes a file that a
kill cut short for whole.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from pipelines import console, files
from pipelines.trainer.checkpoints import sizes

_WHOLE = "whole.json"


class DataIndex(Callback):
    """Records the files of `directory` once they are whole. Use `discard_unfinished` before the index is built."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def discard_unfinished(self) -> None:
        """Remove the index unless it is the one on record. On one rank, before the others ask for it."""
        try:
            recorded = json.loads((self.directory / _WHOLE).read_text())
        except (OSError, json.JSONDecodeError):
            recorded = None
        if recorded is None or recorded != self._sizes():
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Lightning has made both loaders: every file is written.
        if console.rank() == 0:
            files.sync_files(self.directory / name for name in self._sizes())
            files.write_json(self.directory / _WHOLE, self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {name: size for name, size in sizes(self.directory).items() if name != _WHOLE}

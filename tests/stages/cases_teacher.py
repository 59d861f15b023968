"""Runs on the pool of ranks: the teacher stage up to its training, one rank later than the other."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipelines.artifacts import StageContext
from pipelines.config import Config, Layout
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.stages import teacher


def start(directory: str, late: int) -> int:
    """How often this rank has met the others by the time that training begins. late: the rank that looks at the
    directory when the other has written there."""
    config = Config()
    config.teacher.mode = teacher.TeacherMode.pretrain
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 16, "num_hidden_layers": 1}
    for name, size in sizes.items():
        setattr(config.model.shape, name, size)
    meet, place = parallel.initialize, Path(directory) / "start"

    def delayed(*arguments: Any, **settings: Any) -> None:
        meet(*arguments, **settings)
        deadline = time.monotonic() + 3
        while torch.distributed.get_rank() == late and not place.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    met, collective = 0, parallel.on_first_rank

    def counted(action: Any) -> Any:
        nonlocal met
        met += 1
        return action() if torch.distributed.get_rank() == 0 else None

    def train(context: StageContext, ranks: Layout, start: Path, shape: ModelShape) -> dict[str, Any]:
        return {"met": met}

    with (
        mock.patch.object(parallel, "initialize", delayed),
        mock.patch.object(parallel, "on_first_rank", counted),
        mock.patch.object(teacher, "_train", train),
    ):
        found = teacher.run(StageContext(config, "teacher", Path(directory)))["met"]
    collective(lambda: None)
    return int(found)

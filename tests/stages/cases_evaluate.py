"""Runs on the pool of ranks: evaluate and export as they are dispatched, without the dispatcher."""

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines import artifacts
from pipelines.config import Config
from tests.stages.small_run import configure


def run(stage: str, root: str, name: str = "small", **settings: Any) -> dict[str, Any]:
    """Returns the stage's figures, or {"error": message} for a user's mistake."""
    config = configure(Path(root), **settings)
    config.run.name = name
    directory = artifacts.stage_directory(config, stage)
    directory.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"pipelines.stages.{stage}")
    try:
        with mock.patch.object(module, "SPEED_SECONDS", 0.05, create=True):  # the usual 1.5 per model
            return module.run(artifacts.StageContext(config, stage, directory))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def with_another_view(root: str, **settings: Any) -> dict[str, Any]:
    """Ranks behind the first look for the student in a directory that has none, as on a disk that lags behind."""
    import torch

    from pipelines.stages import evaluate

    found = evaluate.find_models

    def lagging(config: Config) -> tuple[dict[str, Path], dict[str, str]]:
        directories, missing = found(config)
        if torch.distributed.get_rank():
            missing |= {"student": f"no model in {directories.pop('student')}"}
        return directories, missing

    with mock.patch.object(evaluate, "find_models", lagging):
        return run("evaluate", root, **settings)

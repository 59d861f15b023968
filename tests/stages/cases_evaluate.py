"""Runs on the pool of ranks: evaluate and export as they are dispatched, without the dispatcher."""

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines import artifacts
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

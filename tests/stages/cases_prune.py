"""Runs on the pool of ranks: the prune stage as it is dispatched, without the dispatcher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.artifacts import StageContext
from pipelines.config import Config
from pipelines.stages import prune


def configured(directory: str, teacher: str, corpus: str, settings: dict[str, Any]) -> Config:
    """settings: {"student.hidden_size": 8, ...} on top of small sizes."""
    config = Config()
    config.run.directory, config.run.name = str(Path(directory).parent), Path(directory).name
    config.model.path, config.data.corpus = teacher, corpus
    config.prune.sequence_length, config.prune.calibration_samples, config.prune.micro_batch_size = 16, 12, 4
    config.distil.sequence_length, config.distil.micro_batch_size, config.distil.global_batch_size = 16, 2, 4
    config.distil.steps, config.distil.warmup_steps, config.distil.learning_rate = 40, 4, 1e-2
    config.distil.validation_batches, config.distil.checkpoint_interval = 2, 2
    for path, value in settings.items():
        *groups, name = path.split(".")
        target: Any = config
        for group in groups:
            target = getattr(target, group)
        assert hasattr(target, name), path
        setattr(target, name, value)
    return config


def run(directory: str, teacher: str, corpus: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures."""
    config = configured(directory, teacher, corpus, settings)
    stage = Path(directory) / "prune"
    stage.mkdir(parents=True, exist_ok=True)
    return prune.run(StageContext(config, "prune", stage))


def error(**arguments: Any) -> str:
    return error_of(run, arguments)


def error_of(case: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """What it refuses; "" where it does not."""
    try:
        case(**arguments)
    except ValueError as error:
        return str(error)
    return ""

"""Runs on the pool of ranks: the prune stage as it is dispatched, without the dispatcher."""

from pathlib import Path
from typing import Any

from pipelines.artifacts import StageContext
from pipelines.config import Config
from pipelines.stages import prune


def run(directory: str, teacher: str, corpus: str, settings: dict[str, Any]) -> dict[str, Any]:
    """settings: {"student.hidden_size": 8, ...} on top of the defaults. Returns the figures."""
    config = Config()
    config.run.directory, config.run.name = str(Path(directory).parent), Path(directory).name
    config.model.path, config.data.corpus = teacher, corpus
    config.prune.sequence_length, config.prune.calibration_samples, config.prune.micro_batch_size = 16, 12, 4
    for path, value in settings.items():
        group, name = path.split(".")
        assert hasattr(getattr(config, group), name)
        setattr(getattr(config, group), name, value)
    stage = Path(directory) / "prune"
    stage.mkdir(parents=True, exist_ok=True)
    return prune.run(StageContext(config, "prune", stage))


def error(**arguments: Any) -> str:
    try:
        run(**arguments)
    except ValueError as error:
        return str(error)
    return ""

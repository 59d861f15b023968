"""Runs on the pool of ranks: the prune stage as it is dispatched, with a target, stopped on purpose or not."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines.artifacts import StageContext
from pipelines.stages import prune
from tests.stages.cases_prune import configured, error_of
from tests.trainer.cases_training import nemo_on_cpu


class Stopped(Exception):
    """A search that ends here without a word of its own."""


def run(
    directory: str,
    teacher: str,
    corpus: str,
    settings: dict[str, Any],
    stop_after: int | None = None,
    stop_step: int | None = None,
) -> dict[str, Any]:
    """{"figures", or "stopped": True where the search was stopped right after it had written search.json so often, or
    right before this step of a distillation; "counts": how often this call ran the measurements; "continued": the step
    at which its first distillation set off}."""
    from pipelines.model import quality
    from pipelines.pruning import search, search_file, speed
    from pipelines.pruning.loaded_teacher import STUDENT

    config = configured(directory, teacher, corpus, settings)
    stage = Path(directory) / "prune"
    stage.mkdir(parents=True, exist_ok=True)
    counts = {"losses": 0, "slices": 0, "writes": 0}
    starts: list[int] = []
    evaluate, put, slices = quality.evaluate, search_file.SearchFile.put, search.slice_checkpoint

    def counted(models: Any, *arguments: Any, **keywords: Any) -> Any:
        counts["losses"] += STUDENT in models
        return evaluate(models, *arguments, **keywords)

    def sliced(*arguments: Any, **keywords: Any) -> Any:
        counts["slices"] += 1
        return slices(*arguments, **keywords)

    def written(file: Any, place: Any, value: Any) -> Any:
        found = put(file, place, value)
        counts["writes"] += 1
        if counts["writes"] == stop_after:
            raise Stopped
        return found

    with (
        mock.patch.object(quality, "evaluate", counted),
        mock.patch.object(speed, "SECONDS", 0.01),
        mock.patch.object(search, "slice_checkpoint", sliced),
        mock.patch.object(search_file.SearchFile, "put", written),
    ):
        try:
            distils = settings.get("prune.search.distil_tokens")
            with _distilling(stop_step, starts) if distils else nullcontext():
                figures = prune.run(StageContext(config, "prune", stage))
            return {"figures": figures, "counts": counts, "continued": starts[0] if starts else None}
        except Stopped:
            return {"stopped": True, "counts": counts}


@contextmanager
def _distilling(stop_step: int | None, starts: list[int]) -> Iterator[None]:
    """A teacher of random weights is accepted; training stops before a step; where each began goes into starts."""
    nemo_on_cpu()
    from pipelines.trainer import distillation
    from pipelines.trainer.callbacks import Metrics

    begin, batch = Metrics.on_train_start, Metrics.on_train_batch_start

    def started(self: Any, trainer: Any, module: Any) -> None:
        starts.append(trainer.global_step)
        begin(self, trainer, module)

    def stepped(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step + 1 == stop_step:
            raise Stopped
        batch(self, trainer, module, *rest)

    with (
        mock.patch.object(distillation, "_check_teacher"),
        mock.patch.object(Metrics, "on_train_start", started),
        mock.patch.object(Metrics, "on_train_batch_start", stepped),
    ):
        yield


def error(**arguments: Any) -> str:
    return error_of(run, arguments)

"""Work on whole models shared out to the ranks, each with one model open at a time."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipelines import console, processes, stopping
from pipelines.config import UserError
from pipelines.evaluation import hugging_face
from pipelines.model.parallel import on_every_rank

# Inputs of the stage (artifacts.INPUTS) that a model's files are.
INPUTS = {"teacher": ("teacher",), "pruned": ("start",), "student": ("student", "given_student")}

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Models:
    """directories: by name. precision: "fp32" or "bf16". device: "cpu" or "cuda". spread: each model's layers over all
    devices of a machine, one rank of which is at work."""

    directories: dict[str, Path]
    corpus: Path
    precision: str
    device: str
    spread: bool = False


class Bench:
    """The model that a rank has open."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._open: tuple[str, Any, Any] | None = None

    def open(self, name: str) -> tuple[Any, Any]:
        """(model, tokenizer) in transformers. Raises UserError where they cannot be opened."""
        if self._open is None or self._open[0] != name:
            self.clear()
            directory, settings = self._models.directories[name], self._models
            tokenizer = hugging_face.open_tokenizer(directory, settings.corpus)
            model = hugging_face.load(
                directory, precision=settings.precision, device=settings.device, spread=settings.spread
            )
            self._open = name, model, tokenizer
        return self._open[1:]

    def clear(self) -> None:
        self._open = None
        gc.collect()
        if self._models.device == "cuda":
            torch.cuda.empty_cache()


def share(
    title: str, units: Sequence[Unit], models: Models, work: Callable[[Bench, Unit], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `work` returns (JSON) for each unit, in their order; {"gap": reason} where it raised UserError or had no
    room.

    Every rank calls it; no collective while ranks are at work. Raises Stopped on every rank where one was asked to
    stop.
    """
    number, workers = _worker(models.spread)
    mine = range(len(units))[number::workers] if number is not None else range(0)

    def run() -> dict[str, Any]:
        found: list[Any] = []
        bench = Bench(models)
        with console.progress(title, len(mine), "parts") as bar:
            for place in mine:
                if stopping.asked():
                    return {"found": found, "stopped": True}
                found.append([place, _or_gap(lambda place=place: work(bench, units[place]))])
                bar.advance(1)
        bench.clear()
        return {"found": found, "stopped": False}

    rounds = on_every_rank(run)
    if any(each["stopped"] for each in rounds):
        raise stopping.Stopped(f"stopped as asked: what there is of {title} is kept, and the same command continues.")
    return [result for _, result in sorted((pair for each in rounds for pair in each["found"]), key=lambda p: p[0])]


def _or_gap(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except UserError as error:
        return {"gap": str(error)}
    except torch.OutOfMemoryError as error:
        return {"gap": f"expected room on this device, found: {error}. Lower the part's micro_batch_size."}


def _worker(spread: bool) -> tuple[int | None, int]:
    """(this rank's number among those at work, None for one that only waits; how many are)."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not spread:
        return rank, world
    each = processes.local_world_size()
    number, local = divmod(rank, each)
    return (None if local else number), max(1, world // each)

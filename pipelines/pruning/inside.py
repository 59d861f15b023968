"""What a candidate would score, measured inside the teacher, which is loaded when it is first needed."""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines import artifacts
from pipelines.choices import Measure
from pipelines.config import Config, Layout
from pipelines.core.selection import Kept
from pipelines.families import ModelShape
from pipelines.model import quality
from pipelines.model.masking import pruned
from pipelines.model.windows import Windows, end_of_document, split_prefixes
from pipelines.pruning.calibration import calibration_batches, calibration_windows
from pipelines.pruning.removal import Measurement
from pipelines.pruning.scores import load_teacher
from pipelines.questions import TaskScore


class Inside:
    """Every rank makes one, at the layout of prune, and calls it alike.

    Losses are in nats/token over prune.calibration_samples sequences of a split, the same at every layout; the task is
    prune.task. Collectives: those of quality.evaluate and of model/tasks.py. directory: the teacher's.
    """

    def __init__(self, config: Config, ranks: Layout, directory: Path, teacher: ModelShape) -> None:
        self.config, self.ranks, self.directory, self.teacher = config, ranks, directory, teacher
        self._model: GPTModel | None = None
        self._batches: dict[str, list[dict[str, torch.Tensor]]] = {}
        self._tasks: Measurement | None = None

    def calibration(self, kept: Kept) -> float:
        return self._loss(kept, "calibration")

    def validation(self, kept: Kept) -> float:
        return self._loss(kept, "validation")

    def task(self, kept: Kept) -> TaskScore:
        with pruned(self._opened(), kept, self.teacher):
            return self.task_of(self._opened())

    def task_of(self, model: GPTModel) -> TaskScore:
        """Of a model of its own, such as a distilled candidate."""
        if self._tasks is None:
            samples = self.config.prune.calibration_samples
            self._tasks = Measurement(self.config, self.directory, self.teacher, self._opened, samples)
            self._tasks.prepare(Measure.task)
        return self._tasks.task(model)

    def release(self) -> None:
        """Let go of the teacher."""
        self._model = self._tasks = None
        self._batches.clear()
        free()

    def _opened(self) -> GPTModel:
        if self._model is None:
            model = load_teacher(self.config, self.ranks, self.directory, self.teacher)
            self._model = model.requires_grad_(False)
        return self._model

    def _loss(self, kept: Kept, split: str) -> float:
        if split not in self._batches:
            self._batches[split] = list(self._read(split))
        with pruned(self._opened(), kept, self.teacher):
            vocab_size = self.teacher.vocab_size
            found = quality.evaluate({"candidate": self._opened()}, self._batches[split], vocab_size=vocab_size)
        return found["candidate"].loss

    def _read(self, split: str) -> Iterator[dict[str, torch.Tensor]]:
        settings, corpus = self.config.prune, artifacts.corpus_directory(self.config)
        if split == "calibration":
            windows = calibration_windows(self.config, self.directory, self.teacher)
        else:
            end = end_of_document(corpus, split) if settings.document_mask else None
            windows = Windows(split_prefixes(corpus, split), settings.sequence_length, end)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        samples = min(settings.calibration_samples, len(windows))
        return calibration_batches(windows, samples, settings.micro_batch_size, rank, ranks)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

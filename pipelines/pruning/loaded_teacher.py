"""The teacher of a pruning: loaded when it is first needed, and what its students would score, measured inside it."""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines.config import Config, Layout
from pipelines.core.selection import Kept
from pipelines.families import ModelShape
from pipelines.model import quality, tasks
from pipelines.model.build import build_model
from pipelines.model.masking import pruned
from pipelines.model.weights import load_hugging_face
from pipelines.pruning.calibration import calibration_batches, calibration_windows, windows_of
from pipelines.questions import Question, Row, TaskScore, read_questions, score, tokenizer_directory
from pipelines.text.multiple_choice import encode

STUDENT = "the pruned teacher"


class LoadedTeacher:
    """Every rank makes one, at the layout of prune, and calls it alike. What it reads it holds until `release`.

    directory: Hugging Face's, of a model of this shape. Collectives: those of quality.evaluate and of model/tasks.py.
    """

    def __init__(self, config: Config, ranks: Layout, directory: Path, shape: ModelShape) -> None:
        self.config, self.ranks, self.directory, self.shape = config, ranks, directory, shape
        self._model: GPTModel | None = None
        self._batches: dict[tuple[str, int], list[dict[str, torch.Tensor]]] = {}
        self._questions: tuple[list[Question], list[Row]] | None = None

    def model(self) -> GPTModel:
        """This rank's shard, in prune.precision, without gradients."""
        if self._model is None:
            self._model = build_model(
                self.shape,
                sequence_parallel=self.ranks.sequence_parallel,
                precision=self.config.prune.precision.value,
                sequence_length=self.config.prune.sequence_length,
            ).requires_grad_(False)
            load_hugging_face(self._model, self.directory, self.shape)
        return self._model

    def batches(self, split: str, samples: int, micro_batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """This data rank's share of `samples` sequences of a split, or of all that it has.

        Raises UserError, when it is called, where the corpus does not fit the teacher or has too little to calibrate.
        """
        if split == "calibration":
            windows = calibration_windows(self.config, self.directory, self.shape)
        else:
            windows = windows_of(self.config, split)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return calibration_batches(windows, min(samples, len(windows)), micro_batch_size, rank, ranks)

    def loss(self, kept: Kept, split: str = "calibration", samples: int | None = None) -> float:
        """The student's, nats/token, over sequences of the split that are the same at every layout.

        samples: prune.calibration_samples where None.
        """
        count, size = samples or self.config.prune.calibration_samples, self.config.prune.micro_batch_size
        if (split, count) not in self._batches:
            self._batches[split, count] = list(self.batches(split, count, size))
        with pruned(self.model(), kept, self.shape):
            models, batches = {STUDENT: self.model()}, self._batches[split, count]
            return quality.evaluate(models, batches, vocab_size=self.shape.vocab_size)[STUDENT].loss

    def task(self, kept: Kept) -> TaskScore:
        """The student's answers to prune.task."""
        self._read_questions()
        with pruned(self.model(), kept, self.shape):
            return self.task_of(self.model())

    def task_of(self, model: GPTModel) -> TaskScore:
        """The answers of any model of the teacher's vocabulary as it is, such as a distilled student."""
        questions, rows = self._read_questions()
        budget, vocab_size = (
            self.config.prune.micro_batch_size * self.config.prune.sequence_length,
            self.shape.vocab_size,
        )
        return score(questions, tasks.log_likelihoods(model, rows, vocab_size=vocab_size, tokens_per_pass=budget))

    def release(self) -> None:
        """Let go of the model and of the sequences."""
        self._model = None
        self._batches.clear()
        free()

    def _read_questions(self) -> tuple[list[Question], list[Row]]:
        """Raises UserError where they do not fit the teacher."""
        if self._questions is None:
            assert self.config.prune.task, "validation asks for prune.task"
            questions = read_questions(self.config.prune.task)
            tokenizer = tokenizer_directory(self.config, self.directory, self.shape)
            longest = self.shape.sliding_window or self.shape.max_position_embeddings
            self._questions = questions, encode(questions, tokenizer, self.shape.vocab_size, longest)
        return self._questions


def free() -> None:
    """Give the memory of models that nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

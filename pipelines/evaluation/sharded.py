"""The run's models as shards over the ranks, and their quality on windows of text."""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines import console
from pipelines.config import Config, Layout
from pipelines.families import ModelShape
from pipelines.model import quality
from pipelines.model.build import build_model
from pipelines.model.tally import Breakdown
from pipelines.model.weights import load_hugging_face
from pipelines.model.windows import Windows, batches, chosen_windows
from pipelines.text.token_classes import TokenClasses, read_token_classes

Array = numpy.ndarray[Any, Any]


def precision(config: Config) -> str:
    return str((config.evaluate.precision or config.distil.precision).value)


class Sharded:
    """Every model that has a shape, read when first asked for; together they stay in memory until `release`."""

    def __init__(
        self,
        config: Config,
        ranks: Layout,
        directories: dict[str, Path],
        shapes: dict[str, ModelShape],
        corpus: Path,
    ) -> None:
        self._config, self._ranks, self.corpus = config, ranks, corpus
        self.directories, self.shapes = directories, shapes
        self.vocab_size = shapes["teacher"].vocab_size
        self._models: dict[str, GPTModel] = {}

    @cached_property
    def _classes(self) -> TokenClasses:
        return read_token_classes(self.corpus / "tokenizer")

    def models(self) -> dict[str, GPTModel]:
        if not self._models:
            self._models = {name: self._load(name) for name in self.shapes}
        return self._models

    def release(self) -> None:
        self._models = {}

    def _load(self, name: str) -> GPTModel:
        settings = self._config.evaluate
        model = build_model(
            self.shapes[name],
            sequence_parallel=self._ranks.sequence_parallel,
            precision=precision(self._config),
            sequence_length=max([settings.sequence_length, *settings.long_context]),
        )
        load_hugging_face(model, self.directories[name], self.shapes[name])
        return model

    def measure(
        self, windows: Windows, token_bytes: Array, what: str, micro_batch_size: int, limit: int | None = None
    ) -> dict[str, quality.Quality]:
        """Every model on the windows, or on those that `limit` micro batches per data-parallel rank take.

        token_bytes: (vocab_size,) float64. what: for the progress bar. Collective: that of `quality.evaluate`.
        """
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        chosen = chosen_windows(windows, micro_batch_size, ranks, limit)
        by = Breakdown(
            windows.documents_of(chosen),
            self._classes,
            token_bytes,
            windows.sequence_length,
        )
        mine = batches(windows, micro_batch_size, rank, ranks, limit, documents=True)
        started, done = time.monotonic(), 0
        with console.progress(what, -(-len(chosen) // (micro_batch_size * ranks)), "batches") as bar:

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens * ranks
                bar.advance(1, detail=f"{done / (time.monotonic() - started):,.0f} tokens/s")

            return quality.evaluate(self.models(), mine, vocab_size=self.vocab_size, by=by, advance=advance)

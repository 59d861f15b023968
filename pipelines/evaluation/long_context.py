"""Loss by position in sequences longer than those of training, on documents that are long enough."""

from typing import Any

from pipelines import artifacts
from pipelines.config import Config
from pipelines.evaluation.comparison import compared, entries
from pipelines.evaluation.sharded import Sharded
from pipelines.model.windows import LongDocuments, mean_token_bytes, split_prefixes

OF_A_MODEL = ("loss", "kl", "agreement", "by_position")


def measure(config: Config, length: int, sharded: Sharded) -> dict[str, Any]:
    """A length's entry in results.json (stages/evaluate.py has its form): the beginning of every document of the split
    that has more than `length` tokens, or of as many as evaluate.batches takes.

    Every rank calls it. Raises UserError on every rank where no document is long enough.
    """
    settings, corpus = config.evaluate, artifacts.corpus_directory(config)
    windows = LongDocuments(split_prefixes(corpus, settings.split), length)
    found = sharded.measure(
        windows,
        mean_token_bytes(corpus, settings.split, sharded.vocab_size),
        f"length {length}",
        max(1, settings.micro_batch_size * settings.sequence_length // length),
        settings.batches,
    )
    intervals, differences, documents = compared(found)
    return {
        "sequence_length": length,
        "tokens": found["teacher"].tokens,
        "documents": documents,
        "models": entries(found, intervals, OF_A_MODEL),
        "differences": differences,
    }

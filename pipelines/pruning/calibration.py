"""The calibration split as batches: the same windows at every layout."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines import artifacts
from pipelines.config import Config, UserError
from pipelines.families import ModelShape
from pipelines.model.windows import Windows, end_of_document, split_prefixes
from pipelines.vocabulary import check_vocabulary


def calibration_batches(
    windows: Windows, samples: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`samples` windows spread evenly over the split, the same at every layout, dealt out to the data ranks in turn.

    With windows.end_of_document they are separated ones, which become samples by micro_batch_size 1 alone.
    """
    assert windows.end_of_document is None or micro_batch_size == 1
    chosen = [sample * len(windows) // samples for sample in range(samples)][data_rank::data_size]
    for start in range(0, len(chosen), micro_batch_size):
        rows = chosen[start : start + micro_batch_size]
        found = torch.stack([windows[row] for row in rows])
        tokens = found[:, :-1].contiguous()
        mask = torch.stack([windows.mask(row) for row in rows])
        batch = {
            "tokens": tokens,
            "labels": found[:, 1:].contiguous(),
            "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
            "loss_mask": mask,
        }
        yield windows.laid_out(batch)


def windows_of(config: Config, split: str) -> Windows:
    """A split in windows of prune's sequence length. Raises UserError where the corpus has no such split."""
    corpus = artifacts.corpus_directory(config)
    prefixes = split_prefixes(corpus, split)
    end = end_of_document(corpus, split) if config.prune.document_mask else None
    return Windows(prefixes, config.prune.sequence_length, end)


def calibration_windows(config: Config, directory: Path, teacher: ModelShape) -> Windows:
    """Those of the calibration split. directory: the teacher's.

    Raises UserError where the split has too few, or another tokenizer's ids.
    """
    corpus, settings = artifacts.corpus_directory(config), config.prune
    check_vocabulary(corpus, directory, teacher.vocab_size)
    windows = windows_of(config, "calibration")
    if len(windows) < settings.calibration_samples:
        raise UserError(
            f"prune.calibration_samples: expected {settings.calibration_samples} sequences of "
            f"{settings.sequence_length} tokens in the calibration split of {corpus}, found {len(windows)}. Lower "
            "prune.calibration_samples or prune.sequence_length, or make a corpus with more text or a larger "
            "data.calibration_fraction."
        )
    return windows

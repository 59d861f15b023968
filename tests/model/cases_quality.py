"""Runs on the pool of ranks: quality of models of given directories at a layout."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from pipelines.families import read_shape
from pipelines.model import measure, parallel, quality
from pipelines.model.build import build_model
from pipelines.model.weights import load_hugging_face


def rows(vocab_size: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(windows (count, length + 1) int64, mask (count, length)): the mask leaves out a different part of each row."""
    generator = torch.Generator().manual_seed(11)
    windows = torch.randint(vocab_size, (count, length + 1), generator=generator)
    mask = (torch.rand(count, length, generator=generator) > 0.3).float()
    return windows, mask


def batches(windows: torch.Tensor, mask: torch.Tensor, size: int, rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """Every `ranks`-th window, `size` at a time: the last batch is smaller, and ranks may hold different numbers."""
    windows, mask = windows[rank::ranks], mask[rank::ranks]
    for window, kept in zip(windows.split(size), mask.split(size), strict=True):
        if len(window):
            tokens, labels = window[:, :-1], window[:, 1:]
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            yield {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": kept}


def evaluate(
    directories: dict[str, str],
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    count: int = 5,
    length: int = 12,
    size: int = 2,
    poison: str | None = None,
) -> dict[str, Any]:
    """poison: the model of which one weight becomes NaN."""
    parallel.initialize(tensor, pipeline)
    models = {}
    for name, directory in directories.items():
        shape = read_shape(directory)
        models[name] = build_model(shape, sequence_parallel=sequence_parallel, sequence_length=length)
        load_hugging_face(models[name], Path(directory), shape)
    if poison:
        next(models[poison].parameters()).data.view(-1)[0] = float("nan")
    windows, mask = rows(shape.vocab_size, count, length)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    seen: list[int] = []
    found = quality.evaluate(
        models,
        batches(windows, mask, size, rank, ranks),
        vocab_size=shape.vocab_size,
        advance=seen.append,
    )
    assert all(model.training for model in models.values())
    return {name: dataclasses.asdict(value) for name, value in found.items()} | {"seen": sum(seen)}


def speed(directory: str, tensor: int = 1, pipeline: int = 1, seconds_per_pass: float = 0.0) -> dict[str, float]:
    """seconds_per_pass: what the clock shall show; 0: the real one. A batch is 2 * 12 tokens."""
    parallel.initialize(tensor, pipeline)
    shape = read_shape(directory)
    model = build_model(shape, sequence_length=12)
    load_hugging_face(model, Path(directory), shape)
    windows, mask = rows(shape.vocab_size, 2, 12)
    batch = next(batches(windows, mask, 2, 0, 1))
    real = measure.seconds
    try:
        if seconds_per_pass:
            measure.seconds = lambda *arguments: seconds_per_pass
        return quality.tokens_per_second({"teacher": model}, batch, seconds=0.05)
    finally:
        measure.seconds = real

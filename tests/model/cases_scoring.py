"""Runs on the pool of ranks: scores of one teacher at a given layout."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from pipelines.choices import Aggregation
from pipelines.core.importance import Scores
from pipelines.families import read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.scoring import score
from pipelines.model.taylor import score_taylor
from pipelines.model.weights import load_hugging_face
from tests.model.teachers import sample_rows


def make_batches(
    tokens: torch.Tensor, mask: torch.Tensor, size: int, rank: int = 0, ranks: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Every `ranks`-th row, in batches of at most `size` rows."""
    tokens, mask = tokens[rank::ranks], mask[rank::ranks]
    positions = torch.arange(tokens.shape[1])
    for rows, kept in zip(tokens.split(size), mask.split(size), strict=True):
        yield {"tokens": rows, "position_ids": positions.expand_as(rows), "labels": rows, "loss_mask": kept}


def scores(
    directory: str,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    samples: int = 7,
    length: int = 12,
    micro_batch_size: int = 2,
    precision: str = "fp32",
    taylor: bool = False,
    **aggregations: str,
) -> dict[str, Any]:
    """aggregations: sequence_aggregation, sample_aggregation, by their words."""
    parallel.initialize(tensor, pipeline)
    shape = read_shape(directory)
    model = build_model(shape, sequence_parallel=sequence_parallel, precision=precision, sequence_length=length)
    load_hugging_face(model, directory, shape)
    tokens, mask = sample_rows(shape.vocab_size, samples, length)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    done: list[int] = []
    size = 1 if taylor else micro_batch_size
    batches = make_batches(tokens, mask, size, rank, ranks)
    words: dict[str, Any] = {name: Aggregation(word) for name, word in aggregations.items()}
    if taylor:
        found = score_taylor(model, batches, vocab_size=shape.vocab_size, advance=done.append, **words)
    else:
        found = score(model, batches, micro_batch_size=size, advance=done.append, **words)
    assert model.training and not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(p.requires_grad and p.grad is None and not p._backward_hooks for p in model.parameters())
    assert sum(done) == samples
    return as_numpy(found)


def as_numpy(found: Scores) -> dict[str, Any]:
    return {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in vars(found).items()}


def error_of(**arguments: Any) -> str:
    try:
        scores(**arguments)
    except ValueError as error:
        return str(error)
    return ""

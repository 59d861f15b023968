"""Runs on the pool of ranks: a teacher that computes what its students would."""

from typing import Any

import numpy
import torch
from megatron.core import parallel_state

from pipelines.core.selection import Kept
from pipelines.families import read_shape
from pipelines.model import parallel, quality
from pipelines.model.build import build_model
from pipelines.model.masking import pruned
from pipelines.model.weights import load_hugging_face
from tests.model.cases_quality import batches, rows


def logits_and_losses(
    directory: str, students: list[Kept], tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False
) -> list[tuple[numpy.ndarray, float]]:
    """Of each student, computed by the teacher: its logits of two rows and its loss on five."""
    parallel.initialize(tensor, pipeline)
    shape = read_shape(directory)
    model = build_model(shape, sequence_parallel=sequence_parallel, sequence_length=12)
    load_hugging_face(model, directory, shape)
    windows, mask = rows(shape.vocab_size, 5, 12)
    sample = next(batches(windows, mask, 2, 0, 1))
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def logits() -> torch.Tensor:
        return quality.gathered_logits(model, sample, shape.vocab_size)

    names, before = [name for name, _ in model.named_parameters()], logits()
    found: list[tuple[numpy.ndarray, float]] = []
    for kept in students:
        with pruned(model, kept, shape):
            mine = batches(windows, mask, 2, rank, ranks)
            loss = quality.evaluate({"model": model}, mine, vocab_size=shape.vocab_size)["model"].loss
            found.append((logits().numpy(), loss))
        assert torch.equal(logits(), before)
    try:
        with pruned(model, students[-1], shape):
            raise KeyError("in the middle of it")
    except KeyError:
        assert torch.equal(logits(), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return found


def student_logits(directory: str) -> numpy.ndarray:
    """Of a sliced student's own directory, for the rows of `logits_and_losses`. Of one rank."""
    parallel.initialize(1)
    shape = read_shape(directory)
    model = build_model(shape, sequence_length=12)
    load_hugging_face(model, directory, shape)
    windows, mask = rows(shape.vocab_size, 5, 12)
    return quality.gathered_logits(model, next(batches(windows, mask, 2, 0, 1)), shape.vocab_size).numpy()


def bf16_losses(directory: str, students: list[Kept]) -> list[float]:
    """As `logits_and_losses`, with weights in bf16, on one rank."""
    parallel.initialize(1)
    shape = read_shape(directory)
    model = build_model(shape, sequence_length=12, precision="bf16")
    load_hugging_face(model, directory, shape)
    windows, mask = rows(shape.vocab_size, 5, 12)
    losses: list[Any] = []
    for kept in students:
        with pruned(model, kept, shape):
            mine = batches(windows, mask, 2, 0, 1)
            losses.append(quality.evaluate({"model": model}, mine, vocab_size=shape.vocab_size)["model"].loss)
    return losses

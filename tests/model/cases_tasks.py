"""Runs on the pool of ranks: log-likelihoods of continuations by a model of a given directory."""

from pathlib import Path

import torch

from pipelines.families import read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.tasks import log_likelihoods
from pipelines.model.weights import load_hugging_face
from pipelines.questions import Row


def rows(vocab_size: int, count: int = 9) -> list[Row]:
    """Of different lengths, 2 to 14 ids, with continuations of 1 to 5."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        length, continuation = 2 + (number * 5) % 13, 1 + number % 5
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        found.append(Row(tuple(ids), min(continuation, length - 1)))
    return found


def likelihoods(
    directory: str,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    tokens_per_pass: int = 24,
    count: int = 9,
    poison: bool = False,
) -> list[float]:
    parallel.initialize(tensor, pipeline)
    shape = read_shape(directory)
    model = build_model(shape, sequence_parallel=sequence_parallel)
    load_hugging_face(model, Path(directory), shape)
    if poison:
        model.decoder.layers[0].mlp.linear_fc2.weight.data[0, 0] = float("nan")
    done: list[int] = []
    found = log_likelihoods(
        model,
        rows(shape.vocab_size, count),
        vocab_size=shape.vocab_size,
        tokens_per_pass=tokens_per_pass,
        advance=done.append,
    )
    assert sum(done) == count and model.training
    return found

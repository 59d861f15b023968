"""Forward passes alone through Megatron's schedule, which sends hidden states between pipeline stages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pipelines.model.documents import packed_sequences

Batch = dict[str, Tensor]


@contextmanager
def evaluating(models: Iterable[GPTModel]) -> Iterator[None]:
    """Models in eval mode, and in the mode they had afterwards."""
    modes = [(model, model.training) for model in models]
    for model, _ in modes:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            model.train(training)


@contextmanager
def without_head(model: GPTModel) -> Iterator[None]:
    """The model's passes end before the output layer."""
    whole = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = whole


def micro_batches_per_pass() -> int:
    """How many micro batches one pass should have: under pipeline parallelism enough to keep the stages busy."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return 1 if stages == 1 else 4 * stages


def forward_pass(
    model: GPTModel,
    batches: Sequence[Batch],
    *,
    keep: bool = False,
    before: Callable[[Batch], None] | None = None,
) -> list[Tensor | None]:
    """One pass over micro batches of the same shape, without gradients; over documents apart where they are separated.

    model: this rank's pipeline stage. batches: with tokens and position_ids (batch, sequence) on the model's device;
    the same on every rank of a model replica. before: called with each micro batch right before its forward.
    Returns what the last stage gives for each micro batch where `keep`, else None for each; [None] on other stages.
    """
    rows, length = batches[0]["tokens"].shape

    def step(iterator: Any, stage: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        if before:
            before(batch)
        output = stage(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed_sequences(batch))
        return output, lambda tensor, non_loss_data: tensor if keep else None

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs or [None]

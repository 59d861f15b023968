"""The training step: what Megatron's schedules call, and the step as a whole for those who train without a framework.

`forward`, `loss_function` and `forward_step` are the contract with any trainer:

    batch   {"tokens", "labels", "position_ids": (batch, sequence) int64, "loss_mask": (batch, sequence) float},
            labels shifted already. A token counts where its mask is not 0 and its label is not -100.
            With "cu_seqlens", from documents.separated, documents stand alone.
    terms   what DistillationPair returns on the last stage: {"loss": the sum over valid tokens, "token_loss" and
            others: (batch, sequence) fp32}; earlier stages: a tensor.
    loss    (that sum, number of valid tokens int32, report). Under calculate_per_token_loss the
            schedule adds the counts of all micro batches and finalize_model_grads sums them over the data-parallel
            group and divides the gradients by the total: the mean over all valid tokens of the global batch.
    report  {name: scalar fp64 sum over the micro batch's valid tokens, for each term; "tokens": their count}.
            `reduce_reports` turns the reports of a step into means over data-parallel ranks and micro batches.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_model_config
from torch import Tensor

from pipelines.core.loss import masked_sum, valid_tokens
from pipelines.model.documents import moved, packed_sequences
from pipelines.model.pair import TERMS, DistillationPair
from pipelines.model.signals import FeatureLosses

Batch = dict[str, Tensor]
Report = dict[str, Tensor]
Loss = tuple[Tensor, Tensor, Report]


def forward(model: Any, batch: Batch) -> dict[str, Tensor] | Tensor:
    """model: a DistillationPair under any wrappers. Returns its terms, or the hidden states for the next stage."""
    return model(
        tokens=batch["tokens"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_sequences(batch),
    )


def loss_function(batch: Batch, terms: dict[str, Tensor]) -> Loss:
    """The sums of one micro batch on one data-parallel rank; no collectives. Shapes and meaning: see the module."""
    valid = valid_tokens(batch["labels"], batch["loss_mask"])
    count = valid.sum()
    per_token = {name: term for name, term in terms.items() if name != "loss"}
    report = {name.removeprefix("token_"): masked_sum(term.double(), valid) for name, term in per_token.items()}
    report["tokens"] = count.double()
    return terms["loss"], count.to(torch.int32), report


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[dict[str, Tensor] | Tensor, partial[Loss]]:
    """Megatron's forward_step_func. Moves the batch to this rank's device, cut under context parallelism."""
    batch = get_batch_on_this_cp_rank(moved(next(batches), torch.cuda.current_device()))
    return forward(model, batch), partial(loss_function, batch)


def reduce_reports(reports: Sequence[Report], features: FeatureLosses | None = None) -> dict[str, float]:
    """Means over valid tokens of each term that was computed, and "tokens", their number, over micro batches and ranks.

    reports: those of this rank's micro batches; empty on every pipeline stage but the last. features: the pair's; their
    means come by their names, and "loss" holds their weighted sum then. One SUM all-reduce over the data-parallel group
    (with context), one broadcast over the pipeline group, and with features those of `take_sums` and two all-reduces
    more; the result is the same on every rank.
    """
    names = (*TERMS, "tokens")
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        for index, name in enumerate(names):
            if name in report:
                sums[0, index] += report[name]
                sums[1, index] += 1
    data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(sums, group=data_group)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    totals, present = (dict(zip(names, row, strict=True)) for row in sums.tolist())
    tokens = totals.pop("tokens")
    means = {name: total / tokens if tokens else float("nan") for name, total in totals.items() if present[name]}
    if features is not None:
        found = features.take_sums()
        torch.distributed.all_reduce(found, group=data_group)
        torch.distributed.all_reduce(found, group=parallel_state.get_pipeline_model_parallel_group())
        for name, total in zip(features.names, found.tolist(), strict=True):
            means[name] = total / tokens if tokens else float("nan")
            means["loss"] += features.factor * features.weights[name] * means[name]
    return means | {"tokens": tokens}


def wrap(pair: DistillationPair, *, distributed_optimizer: bool = False) -> DistributedDataParallel:
    """The pair under Megatron's DistributedDataParallel (and Float16Module for bf16), gradients reduced in fp32.

    Sets finalize_model_grads_func on pair.config, without which gradients would stay unreduced in silence.
    """
    config = pair.config
    assert config.calculate_per_token_loss, "the loss function returns sums, which only per-token loss divides"
    config.finalize_model_grads_func = finalize_model_grads
    module = Float16Module(config, pair) if config.bf16 else pair
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    return DistributedDataParallel(config, ddp_config, module)


def training_step(model: DistributedDataParallel, batches: Sequence[Batch]) -> dict[str, float]:
    """Forward and backward of one global batch; leaves each student parameter's gradient in `parameter.main_grad`.

    batches: this data-parallel rank's micro batches, of equal shape; each rank has as many. Gradients are those of the
    mean over all valid tokens, summed over data-parallel ranks (with the distributed optimizer: of this rank's part of
    each buffer only, see `gather_gradients`). Returns the step's means as `reduce_reports`.
    """
    model.train()
    model.zero_grad_buffer()
    return _run_schedule(model, batches, forward_only=False)


def evaluation_step(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Means of every term the models allow, without gradients; the model's training mode is as before afterwards."""
    training = model.training
    model.eval()
    with torch.no_grad():
        means = _run_schedule(model, batches, forward_only=True)
    model.train(training)
    return means


def _run_schedule(model: Any, batches: Sequence[Batch], *, forward_only: bool) -> dict[str, float]:
    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    if not forward_only:
        assert get_model_config(model).finalize_model_grads_func is not None, "gradients were not reduced"
    return reduce_reports(reports, get_attr_wrapped_model(model, "features"))


def gather_gradients(model: DistributedDataParallel) -> None:
    """Make `main_grad` whole on every rank; a step with the distributed optimizer leaves each rank its own part.

    One all-gather per gradient bucket over the data-parallel group; nothing to do without the distributed optimizer.
    """
    if not model.ddp_config.use_distributed_optimizer:
        return
    for buffer in model.buffers:
        group = buffer.data_parallel_group
        rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        for bucket in buffer.buckets:
            part = bucket.grad_data.chunk(world)[rank].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, part, group=group)

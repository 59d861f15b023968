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
    report  {name: scalar fp64 sum over the micro batch's valid tokens, for each term of MEANS; "tokens": their count;
            in eval mode, with a teacher, "telemetry": the sums of core/telemetry.py; where the batch has "row_hashes",
            "rows": their sum}.
            `reduce_reports` adds up the reports of a step over micro batches and data-parallel ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_model_config
from torch import Tensor

from pipelines.core import telemetry
from pipelines.core.divergence import Telemetry
from pipelines.core.loss import masked_sum, valid_tokens
from pipelines.model.documents import moved, packed_sequences
from pipelines.model.pair import TERMS, DistillationPair
from pipelines.model.signals import FeatureLosses

Batch = dict[str, Tensor]
Report = dict[str, Tensor]
Loss = tuple[Tensor, Tensor, Report]

MEANS = (*TERMS, "overlap", "teacher_entropy")  # what is averaged over valid tokens


@dataclass(frozen=True)
class Totals:
    """Sums over the valid tokens of one step or of several, the same on every rank; `means` divides them, once.

    sums: by the names of MEANS and of losses between layers, those that were computed. telemetry: of core/telemetry.py,
    None where there was none. rows: the sum of all rows' hashes, exact below 2**53; 0 where there were none.
    """

    tokens: float
    sums: dict[str, float]
    telemetry: list[float] | None = None
    rows: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        """Of all steps together; both have computed the same."""
        assert self.sums.keys() == other.sums.keys()
        seen = None
        if self.telemetry is not None and other.telemetry is not None:
            seen = [a + b for a, b in zip(self.telemetry, other.telemetry, strict=True)]
        return Totals(self.tokens + other.tokens, {n: self.sums[n] + other.sums[n] for n in self.sums}, seen)

    def means(self) -> dict[str, float]:
        """Per valid token, by name; "kd_entropy_<band>" where the band has tokens; "student_calibration_error",
        "teacher_calibration_error"; "tokens", their number. Without a valid token means are NaN."""
        found = {name: total / self.tokens if self.tokens else float("nan") for name, total in self.sums.items()}
        if self.telemetry is not None and self.tokens:
            found |= {f"kd_entropy_{band}": mean for band, mean in telemetry.by_entropy(self.telemetry).items()}
            student, teacher = telemetry.calibration_errors(self.telemetry, self.tokens)
            found |= {"student_calibration_error": student, "teacher_calibration_error": teacher}
        return found | {"tokens": self.tokens}


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
    per_token = {name: terms["token_loss" if name == "loss" else name] for name in MEANS if name in terms}
    report = {name: masked_sum(term.double(), valid) for name, term in per_token.items()}
    report["tokens"] = count.double()
    if "row_hashes" in batch:
        report["rows"] = batch["row_hashes"].sum().double()
    if "overlap" in terms:
        seen = Telemetry(*(terms[name] for name in Telemetry._fields))
        report["telemetry"] = telemetry.sums(seen, terms["kd"], valid)
    return terms["loss"], count.to(torch.int32), report


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[dict[str, Tensor] | Tensor, partial[Loss]]:
    """Megatron's forward_step_func. Moves the batch to this rank's device, cut under context parallelism."""
    batch = get_batch_on_this_cp_rank(moved(next(batches), torch.cuda.current_device()))
    return forward(model, batch), partial(loss_function, batch)


def reduce_reports(reports: Sequence[Report], features: FeatureLosses | None = None) -> Totals:
    """The sums of each term that was computed and the number of valid tokens, over micro batches and ranks.

    reports: those of this rank's micro batches; empty on every pipeline stage but the last. features: the pair's; their
    sums come by their names, and "loss" holds their weighted sum then. One SUM all-reduce over the data-parallel group
    (with context) and one broadcast over the pipeline group, of the same few numbers in training and in validation, and
    with features those of `take_sums` and two all-reduces more; the result is the same on every rank.
    """
    names = (*MEANS, "tokens", "rows")
    found = torch.zeros(2 * len(names) + telemetry.SIZE, dtype=torch.float64, device=torch.cuda.current_device())
    parts = [len(names), len(names), telemetry.SIZE]
    sums, counts, seen = found.split(parts)
    for report in reports:
        for index, name in enumerate(names):
            if name in report:
                sums[index] += report[name]
                counts[index] += 1
        if "telemetry" in report:
            seen += report["telemetry"]
    data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(found, group=data_group)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(found, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    sums, counts, seen = found.cpu().split(parts)  # the host waits for the device once
    present = {name for name, count in zip(names, counts.tolist(), strict=True) if count}
    totals = {name: total for name, total in zip(names, sums.tolist(), strict=True) if name in present}
    tokens, rows = totals.pop("tokens"), int(totals.pop("rows", 0))
    if features is not None:
        of_features = features.take_sums()
        torch.distributed.all_reduce(of_features, group=data_group)
        torch.distributed.all_reduce(of_features, group=parallel_state.get_pipeline_model_parallel_group())
        for name, total in zip(features.names, of_features.tolist(), strict=True):
            totals[name] = total
            totals["loss"] += features.factor * features.weights[name] * total
    return Totals(tokens, totals, seen.tolist() if "overlap" in present else None, rows)


def wrap(pair: DistillationPair, *, distributed_optimizer: bool = False, **settings: Any) -> DistributedDataParallel:
    """The pair under Megatron's DistributedDataParallel (and Float16Module for bf16), gradients reduced in fp32.

    settings: other fields of its DistributedDataParallelConfig. Sets finalize_model_grads_func on pair.config, without
    which gradients would stay unreduced in silence, and no_sync_func, by which an overlapped reduction waits for the
    last micro batch.
    """
    config = pair.config
    assert config.calculate_per_token_loss, "the loss function returns sums, which only per-token loss divides"
    config.finalize_model_grads_func = finalize_model_grads
    module = Float16Module(config, pair) if config.bf16 else pair
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, **settings
    )
    model = DistributedDataParallel(config, ddp_config, module)
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    return model


def training_step(model: DistributedDataParallel, batches: Sequence[Batch]) -> dict[str, float]:
    """Forward and backward of one global batch; leaves each student parameter's gradient in `parameter.main_grad`.

    batches: this data-parallel rank's micro batches, of equal shape; each rank has as many. Gradients are those of the
    mean over all valid tokens, summed over data-parallel ranks (with the distributed optimizer: of this rank's part of
    each buffer only, see `gather_gradients`). Returns the step's means, the same on every rank.
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


def run_micro_batches(model: Any, batches: Sequence[Batch], *, forward_only: bool) -> list[Report]:
    """Megatron's schedule over this rank's micro batches, of equal shape; their reports on the last pipeline stage."""
    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    reports: list[Report] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return reports


def _run_schedule(model: Any, batches: Sequence[Batch], *, forward_only: bool) -> dict[str, float]:
    reports = run_micro_batches(model, batches, forward_only=forward_only)
    if not forward_only:
        assert get_model_config(model).finalize_model_grads_func is not None, "gradients were not reduced"
    return reduce_reports(reports, get_attr_wrapped_model(model, "features")).means()


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

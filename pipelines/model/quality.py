"""Quality of sharded models on the same batches: loss, KL from the teacher, agreement, speed of a forward pass.

Each token's figures come from logits that stay sharded (core/divergence.py); what is added up from them, by groups of
tokens too, is in tally.py.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pipelines.config import UserError
from pipelines.core import telemetry
from pipelines.core.divergence import token_terms
from pipelines.core.loss import valid_tokens
from pipelines.core.vocab_parallel import Shard
from pipelines.model import measure
from pipelines.model.documents import moved
from pipelines.model.forward import Batch, evaluating, forward_pass, micro_batches_per_pass
from pipelines.model.tally import COLUMNS, Breakdown, Tally, means
from pipelines.text.token_classes import CLASSES

TEACHER = "teacher"


@dataclass(frozen=True)
class Quality:
    """Means over all valid tokens.

    loss: cross-entropy, nats/token. kl: KL(teacher || model), nats/token at temperature 1. agreement: share of tokens
    whose most likely next token is the teacher's. overlap: of the two distributions, sum of min(p, q). kl_by_entropy,
    calibration_error: see core/telemetry.py. All but the loss: None without a teacher.

    reliability: per calibration bin (confidence, accuracy, share of the tokens), None for one without tokens. With a
    Breakdown also text_bytes: UTF-8 bytes behind the tokens; by_token_class: {class: means}; by_position:
    [(from, to, means)], means as `tally.means` gives them; documents: (documents, tally.COLUMNS) sums, float64.
    """

    tokens: int
    loss: float
    kl: float | None
    agreement: float | None
    overlap: float | None = None
    calibration_error: float | None = None
    kl_by_entropy: dict[str, float] | None = None
    reliability: list[tuple[float, float, float] | None] | None = None
    text_bytes: float | None = None
    by_token_class: dict[str, dict[str, float]] | None = None
    by_position: list[tuple[int, int, dict[str, float]]] | None = None
    documents: Tensor | None = None


def evaluate(
    models: Mapping[str, GPTModel],
    batches: Iterable[Batch],
    *,
    vocab_size: int,
    by: Breakdown | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Quality]:
    """Every model on every batch of this data-parallel rank, held to the one named "teacher" where there is one.

    models: by name, each this rank's pipeline stage, built for the same layout and vocabulary.
    batches: dicts of tokens, labels, position_ids (batch, sequence) int64 and loss_mask (batch, sequence), on the CPU;
        with `by` also documents (batch, sequence) int64; data ranks may hold different numbers of batches and batches
        of different sizes, none included.
    advance: called after each batch with its valid tokens.

    Collectives, besides those of the forward passes: two all-gathers per model and batch over the tensor-parallel group
    (`core.divergence`), one without a teacher; after each rank's first batch and at the end one all-reduce of all sums
    over the data-parallel group and one broadcast over the pipeline. The result is the same on every rank.
    Raises UserError on every rank, naming the model, when a loss is NaN or infinite; ValueError without a valid token.
    """
    assert parallel_state.get_context_parallel_world_size() == 1, "evaluation reads whole sequences"
    device = next(next(iter(models.values())).parameters()).device
    order = sorted(models, key=lambda name: name != TEACHER)  # the teacher's logits come first
    tallies = {name: Tally(by) for name in order}
    first = True

    def check() -> None:
        _require_finite(order, reduced(torch.cat([tallies[name]["all"] for name in order]).to(device)))

    with evaluating(models.values()):
        for batch in batches:
            _add_batch({name: models[name] for name in order}, batch, vocab_size, tallies, device)
            if first:
                check()
            first = False
            if advance:
                advance(int(valid_tokens(batch["labels"], batch["loss_mask"]).sum()))
        if first:
            check()  # a rank without a batch takes part in the others' check
    totals = reduced(torch.stack([tallies[name].sums for name in order]).to(device)).cpu()
    for name, sums in zip(order, totals, strict=True):
        tallies[name].sums = sums
    _require_finite(order, torch.cat([tallies[name]["all"] for name in order]))
    return {name: _quality(tally, has_teacher=TEACHER in models) for name, tally in tallies.items()}


def _add_batch(
    models: Mapping[str, GPTModel], batch: Batch, vocab_size: int, tallies: Mapping[str, Tally], device: torch.device
) -> None:
    """Add the batch's valid tokens to each model's sums on the last pipeline stage; on the others nothing."""
    group = parallel_state.get_tensor_model_parallel_group()
    there, teacher = moved(batch, device), None
    groups: dict[str, Tensor] | None = None
    for name, model in models.items():
        found = forward_logits(model, there)
        if found is None:
            continue
        found = found.flatten(0, 1)
        if name == TEACHER:
            teacher = found  # held to itself
        terms = token_terms(
            found,
            teacher,
            there["labels"].flatten(),
            kd_scale=0.0,
            ce_scale=0.0,
            temperature=1.0,
            shard=Shard.uniform(found.shape[-1], vocab_size, group),
            telemetry=teacher is not None,
        )
        tally = tallies[name]
        if groups is None:
            groups = tally.by.groups(batch) if tally.by is not None else {}
        tally.add(terms, batch, groups)


def forward_logits(model: GPTModel, batch: Batch) -> Tensor | None:
    """Logits (batch, sequence, padded vocabulary / tp) on the last pipeline stage, None on the others. No gradients."""
    return forward_pass(model, [batch], keep=True)[-1]


def tokens_per_second(
    models: Mapping[str, GPTModel], batch: Batch, *, seconds: float = 1.0, warmup: int = 2
) -> dict[str, float]:
    """Forward passes over the same batch on every data-parallel rank, in tokens/s of all ranks together, by model.

    The models take turns, so that whatever else the machine does meets all alike; of each model's passes, by the
    slowest rank's clock, the median counts. seconds: of passes per model, at least 3, after `warmup` passes each.
    Under pipeline parallelism a pass is four micro batches per stage, so that the stages work at the same time. The
    output head is part of it. One barrier and one all-reduce over all ranks per pass.
    """
    per_pass = micro_batches_per_pass()
    found = pass_seconds(models, [batch] * per_pass, seconds=seconds, warmup=warmup)
    tokens = batch["tokens"].numel() * per_pass * parallel_state.get_data_parallel_world_size()
    return {name: tokens / median for name, median in found.items()}


def pass_seconds(
    models: Mapping[str, GPTModel], micro_batches: Sequence[Batch], *, seconds: float = 1.0, warmup: int = 2
) -> dict[str, float]:
    """What `tokens_per_second` measures: the median of a pass over these micro batches, in seconds, by model."""
    device = next(next(iter(models.values())).parameters()).device
    micro_batches = [moved(batch, device) for batch in micro_batches]
    times: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(models.values()):
        for turn in range(warmup + 1000):
            if turn >= warmup + 3 and min(sum(passes) for passes in times.values()) >= seconds:
                break
            for name, model in models.items():
                elapsed = measure.seconds(partial(forward_pass, model, micro_batches), device)
                if turn >= warmup:
                    times[name].append(elapsed)
    return {name: statistics.median(passes) for name, passes in times.items()}


def reduced(sums: Tensor) -> Tensor:
    """Sums of the last pipeline stage over data-parallel ranks, on every rank."""
    total = sums.clone()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(total, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return total


def _require_finite(names: list[str], totals: Tensor) -> None:
    for name, row in zip(names, totals.tolist(), strict=True):
        for figure, value in zip(COLUMNS, row, strict=True):
            if not abs(value) < float("inf"):
                raise UserError(
                    f"{name}: expected a finite {figure}, found {value}. Its weights or activations are not finite: "
                    "check the directory it was read from; with bf16 weights try fp32."
                )


def _quality(tally: Tally, *, has_teacher: bool) -> Quality:
    (whole,) = means(tally["all"])
    if whole is None:
        raise ValueError(
            "evaluation: expected at least one valid token, found none. Give more batches or a longer split."
        )
    tokens = round(whole["tokens"])
    found = Quality(tokens, whole["loss"], kl=None, agreement=None)
    if has_teacher:
        bands = zip(telemetry.ENTROPY_BANDS, means(tally["entropy"]), strict=True)
        bins = [
            (row["confidence"], row["correct"], row["tokens"] / tokens) if row else None
            for row in means(tally["confidence"])
        ]
        found = replace(
            found,
            kl=whole["kl"],
            agreement=whole["agreement"],
            overlap=whole["overlap"],
            kl_by_entropy={name: row["kl"] for name, row in bands if row},
            reliability=bins,
            calibration_error=sum(share * abs(right - sure) for sure, right, share in filter(None, bins)),
        )
    if tally.by is None:
        return found
    edges = tally.by.bounds()
    classes = zip(CLASSES, means(tally["classes"]), strict=False)  # special tokens have none
    positions = zip(edges, edges[1:], means(tally["positions"]), strict=False)
    return replace(
        found,
        text_bytes=whole["bytes"] * tokens,
        by_token_class={name: row for name, row in classes if row},
        by_position=[(start, stop, row) for start, stop, row in positions if row],
        documents=tally["documents"],
    )


def gathered_logits(model: GPTModel, batch: Batch, vocab_size: int) -> Tensor:
    """Logits (batch, sequence, vocab_size) on every rank of a model replica, without the vocabulary's padding.

    For a few tokens: they are whole on every rank. One all-gather over the tensor-parallel group on the last pipeline
    stage, one broadcast over the pipeline.
    """
    device = next(model.parameters()).device
    local = forward_logits(model, moved(batch, device))
    group = parallel_state.get_tensor_model_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if local is not None:
        shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, local.contiguous(), group=group)
        whole = torch.cat(shards, dim=-1)[..., :vocab_size].contiguous()
    else:
        dtype = next(model.parameters()).dtype
        whole = torch.empty(*batch["tokens"].shape, vocab_size, dtype=dtype, device=device)
    if dist.get_world_size(pipeline) > 1:
        dist.broadcast(whole, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return whole

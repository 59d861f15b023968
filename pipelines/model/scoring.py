"""Importance scores of a GPTModel sharded over tensor, sequence, pipeline and data ranks: hooks for core.importance.

Every rank gets the same scores, and they equal those of a single process within the rounding of the matrix products.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines.choices import Aggregation
from pipelines.config import UserError
from pipelines.core.importance import (
    ActivationNorm,
    BlockInfluence,
    Counted,
    Scores,
    first_non_finite,
    hidden_scores,
    over_samples,
    token_norms,
    unit_scores,
)
from pipelines.model.documents import moved
from pipelines.model.forward import Batch, evaluating, forward_pass, micro_batches_per_pass, without_head
from pipelines.model.layers import layer_input

PLACES = ("the norm before attention", "attention", "the norm before the MLP", "the MLP's neurons")


def score(
    model: GPTModel,
    batches: Iterable[Batch],
    *,
    micro_batch_size: int,
    sequence_aggregation: Aggregation = Aggregation.mean,
    sample_aggregation: Aggregation = Aggregation.l2,
    advance: Callable[[int], None] | None = None,
) -> Scores:
    """Score the whole model by forward passes over this data rank's batches, in eval mode and without gradients.

    model: this rank's pipeline stage. The output layer is not run.
    batches: dicts of tokens, position_ids (batch, sequence) int64 and loss_mask (batch, sequence), all of one sequence
        length; a batch smaller than micro_batch_size is filled up with masked samples. Data ranks may hold different
        numbers of batches; the ranks of one model replica hold the same. A sample is a row; tokens with loss_mask 0
        count nowhere. A row of separated documents (model/documents.py) is a sample, and needs micro_batch_size 1.
    advance: called on every rank with the number of samples that all ranks together have done since the last call.

    Collectives, besides those of the forward passes: under sequence parallelism one all-reduce per norm and batch over
    the tensor group; per pass (one batch, or four per pipeline stage) two all-reduces of one number over all ranks; at
    the end two all-reduces of every sum over all ranks.
    Raises UserError on every rank, naming the first such layer, when activations are NaN or infinite.
    """
    assert parallel_state.get_context_parallel_world_size() == 1, "scoring reads whole sequences"
    device = next(model.parameters()).device
    recorder = _Recorder(model, device, sequence_aggregation, sample_aggregation)
    with evaluating([model]), without_head(model):
        try:
            _run(model, recorder, iter(batches), micro_batch_size, advance, device)
        finally:
            recorder.remove_hooks()
    return recorder.reduce()


def _run(
    model: GPTModel,
    recorder: "_Recorder",
    batches: Iterator[Batch],
    micro_batch_size: int,
    advance: Callable[[int], None] | None,
    device: torch.device,
) -> None:
    while True:
        found = list(islice(batches, micro_batches_per_pass()))
        samples = sum_over_replicas(sum(len(batch["tokens"]) for batch in found), device)
        if not samples:
            return
        if found:
            recorder.whole = [_counts_whole(batch, micro_batch_size) for batch in found]
            filled = [_filled_up(moved(batch, device), micro_batch_size) for batch in found]
            forward_pass(model, filled, before=lambda batch: recorder.begin(batch["loss_mask"] > 0))
        recorder.check_finite()
        if advance:
            advance(samples)


def _filled_up(batch: Batch, size: int) -> Batch:
    """The batch with `size` rows: pipeline stages exchange activations of one shape."""
    missing = size - len(batch["tokens"])
    return {name: F.pad(value, (0, 0, 0, missing)) for name, value in batch.items()} if missing else batch


def _counts_whole(batch: Batch, size: int) -> bool:
    """Whether every token of the filled-up batch is known to count, without waiting for a GPU to tell."""
    mask = batch["loss_mask"]
    return len(mask) == size and not mask.is_cuda and bool((mask > 0).all())


def is_first_of_replica() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()


def sum_over_replicas(count: int, device: torch.device) -> int:
    """The sum of count over the model's data-parallel replicas, on every rank. One all-reduce over all ranks."""
    total = torch.tensor(count if is_first_of_replica() else 0, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def require_finite(seen: torch.Tensor, first_layer: int, layers: int, *, gradients: bool = True) -> None:
    """Raises UserError on every rank when any rank has seen a NaN or an infinity. One all-reduce over all ranks.

    seen: (layers of this stage, PLACES), finite where this rank's activations were; first_layer: the number of its
    first; layers: of the whole model. gradients: whether they were finite, where there are any.
    """
    found = first_non_finite(seen.reshape(-1, 1))
    nowhere = layers * len(PLACES)
    first = nowhere + gradients if found is None else (first_layer - 1) * len(PLACES) + found
    place = torch.tensor(first, dtype=torch.int64, device=seen.device)
    dist.all_reduce(place, op=dist.ReduceOp.MIN)
    layer, part = divmod(int(place), len(PLACES))
    if int(place) < nowhere:
        raise UserError(
            f"activations: expected finite numbers, found NaN or infinity in layer {layer + 1} (from 1), first in "
            f"{PLACES[part]}. Check the teacher's weights; with bf16 weights try fp32."
        )
    if int(place) == nowhere:
        raise UserError(
            "gradients: expected finite numbers, found NaN or infinity. Check the teacher's weights; with bf16 weights "
            "try fp32."
        )


class _Recorder:
    """Hooks on this rank's layers, and their accumulators by layer index within the stage."""

    def __init__(self, model: GPTModel, device: torch.device, sequence: Aggregation, samples: Aggregation) -> None:
        self.config, self.device, self.aggregation = model.config, device, samples
        self.layers = list(model.decoder.layers)
        tensor = self.config.tensor_model_parallel_size
        self.query_size = self.config.num_attention_heads * self.config.kv_channels
        sizes = (
            self.config.hidden_size,
            self.query_size // tensor,
            self.config.hidden_size,
            self.config.ffn_hidden_size // tensor,
        )
        self.norms = [
            [ActivationNorm(size, device, sequence=sequence, samples=samples) for size in sizes] for _ in self.layers
        ]
        self.influences = [BlockInfluence(device) for _ in self.layers]
        self.samples = torch.zeros(2, dtype=torch.float64, device=device)  # samples, tokens
        self.whole: list[bool] = []  # of the micro batches to come: whether every token counts
        self.counted = self.own = Counted(torch.zeros(0))  # of whole samples; of this rank's part of the sequence
        self.handles = [handle for index in range(len(self.layers)) for handle in self._hooks(index)]

    def begin(self, mask: torch.Tensor) -> None:
        """mask: (batch, sequence) bool of the micro batch whose forward pass starts now."""
        tokens = mask.sum(1, dtype=torch.float32)
        by_sequence = None if self.whole.pop(0) else mask.t().contiguous()
        self.counted = self.own = Counted(tokens, by_sequence)
        if by_sequence is not None and self.config.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            self.own = Counted(tokens, by_sequence.chunk(self.config.tensor_model_parallel_size)[rank])
        self.samples[0] += (tokens > 0).sum()
        self.samples[1] += mask.sum()

    def _hooks(self, index: int) -> list[Any]:
        layer, (attention_norm, heads, mlp_norm, neurons) = self.layers[index], self.norms[index]
        return [
            layer.self_attention.linear_qkv.register_forward_pre_hook(self._norm_hook(attention_norm)),
            layer.self_attention.linear_proj.register_forward_pre_hook(self._input_hook(heads)),
            layer.mlp.linear_fc1.register_forward_pre_hook(self._norm_hook(mlp_norm)),
            layer.mlp.linear_fc2.register_forward_pre_hook(self._input_hook(neurons)),
            layer.register_forward_hook(self._layer_hook(self.influences[index]), with_kwargs=True),
        ]

    def _norm_hook(self, norm: ActivationNorm) -> Callable:
        # The norm lives inside the linear layer and cannot be hooked. Its output is x * token_scale * weight.
        def hook(linear: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            scale = (token_norms(x).square() / x.shape[-1] + self.config.layernorm_epsilon).rsqrt()
            group = parallel_state.get_tensor_model_parallel_group() if self.config.sequence_parallel else None
            norm.update(
                x, self.own, token_scale=scale, channel_scale=linear.layer_norm_weight.detach(), sequence_group=group
            )

        return hook

    def _input_hook(self, norm: ActivationNorm) -> Callable:
        return lambda linear, inputs: norm.update(inputs[0], self.counted)

    def _layer_hook(self, influence: BlockInfluence) -> Callable:
        def hook(layer: Any, inputs: tuple, keywords: dict, outputs: tuple[torch.Tensor, ...]) -> None:
            hidden = layer_input(inputs, keywords)
            influence.update(hidden, outputs[0], self.own.mask)

        return hook

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()

    def check_finite(self) -> None:
        totals = torch.stack([torch.stack([norm.total.sum() for norm in layer]) for layer in self.norms])
        require_finite(totals, self.layers[0].layer_number, self.config.num_layers)

    def reduce(self) -> Scores:
        """The scores of the whole model, the same on every rank. Two all-reduces over all ranks, float64: of every
        channel's total (MAX where samples are aggregated by it, else SUM), and of the sums that only add up.

        Each rank fills in what it holds (its layers, its shard of channels) and zeros elsewhere, so that one reduction
        gathers over tensor and pipeline ranks and joins data ranks. What tensor ranks hold in common comes from the
        first.
        """
        layers, hidden, ffn = self.config.num_layers, self.config.hidden_size, self.config.ffn_hidden_size
        sizes = [2 * layers * hidden, layers * self.query_size, layers * ffn]
        totals = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        norms, query, neurons = totals.split(sizes)
        norms, query, neurons = norms.view(layers, 2, hidden), query.view(layers, -1), neurons.view(layers, -1)
        sums = torch.zeros(2 * layers + 2, dtype=torch.float64, device=self.device)
        influence, samples = sums[:-2].view(layers, 2), sums[-2:]
        rank = parallel_state.get_tensor_model_parallel_rank()
        for index, layer in enumerate(self.layers):
            number = layer.layer_number - 1
            attention_norm, heads, mlp_norm, mlp = (norm.total for norm in self.norms[index])
            query[number].view(-1, len(heads))[rank] = heads
            neurons[number].view(-1, len(mlp))[rank] = mlp
            if rank == 0:
                norms[number] = torch.stack([attention_norm, mlp_norm])
            if rank == 0 or self.config.sequence_parallel:
                influence[number] = self.influences[index].sums
        if is_first_of_replica():
            samples.copy_(self.samples)
        dist.all_reduce(totals, op=dist.ReduceOp.MAX if self.aggregation is Aggregation.max else dist.ReduceOp.SUM)
        dist.all_reduce(sums)
        influence, (count, tokens) = influence.cpu(), map(int, samples.tolist())
        norms, query, neurons = (over_samples(t.cpu(), count, self.aggregation) for t in (norms, query, neurons))
        groups = self.config.num_query_groups
        return Scores(
            hidden=hidden_scores(norms.flatten(0, 1)),
            ffn=neurons,
            heads=unit_scores(query, self.config.kv_channels),
            kv_groups=unit_scores(query, self.query_size // groups),
            block_influence=influence[:, 0] / influence[:, 1],
            samples=count,
            tokens=tokens,
        )

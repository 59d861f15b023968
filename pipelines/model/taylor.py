"""First-order Taylor importance of a GPTModel sharded over tensor, sequence, pipeline and data ranks.

What the loss of one sample changes by, to first order, when a unit's output becomes zero is

    -sum over the unit's values of activation * dLoss / dactivation

(arXiv 1611.06440, equation 7; 1905.10650, equation 3, for heads). Its absolute value is the unit's score on the sample,
and prune.sample_aggregation joins the samples (core/importance.py). The loss is the mean cross-entropy over the
sample's valid tokens. The sum runs over all tokens and values before the absolute value:

    ffn neuron      its value before the down projection
    head, KV group  its channels of the output projection's input; of a group, those of all its heads
    hidden channel  its values in the output of every norm, the last included. Only that is what a norm's weight does,
                    so the sum over a norm's tokens is weight * dLoss / dweight, and no norm is hooked
    layer           dLoss / doutput times (output - input): what the layer adds becomes zero

Weights are frozen, but the norms', and no gradient of a matrix is computed. The passes also give the block influence.
Memory: accumulators of one number per unit, whatever the number of samples, and the activations of the samples that are
between forward and backward: one, or with pipeline parallelism one per stage.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines.choices import Aggregation
from pipelines.core.importance import BlockInfluence, Scores, add_samples, over_samples
from pipelines.core.loss import valid_tokens
from pipelines.model.forward import Batch, micro_batches_per_pass
from pipelines.model.layers import layer_input
from pipelines.model.pair import DistillationPair
from pipelines.model.scoring import PLACES, is_first_of_replica, require_finite, sum_over_replicas
from pipelines.model.step import run_micro_batches


def score_taylor(
    model: GPTModel,
    batches: Iterable[Batch],
    *,
    vocab_size: int,
    sample_aggregation: Aggregation = Aggregation.l2,
    advance: Callable[[int], None] | None = None,
) -> Scores:
    """Score the whole model by forward and backward passes over this data rank's samples, one at a time.

    model: this rank's pipeline stage; its requires_grad flags and its mode are as before afterwards.
    batches: dicts of tokens, labels, position_ids (1, sequence) int64 and loss_mask (1, sequence), all of one sequence
        length; data ranks may hold different numbers of them. A sample without a valid token counts nowhere.
    vocab_size: without padding. advance: as of scoring.score.

    Returns scores with `taylor_layers`. Collectives, besides those of the training step's passes: per pass (one sample,
    or four per pipeline stage) two all-reduces of one number over all ranks, under sequence parallelism one of a number
    per hidden channel and layer over the tensor group, and one of a number per hidden channel over the pipeline group;
    at the end two all-reduces over all ranks.
    Raises UserError on every rank when activations (naming the first such layer) or gradients are NaN or infinite.
    """
    assert parallel_state.get_context_parallel_world_size() == 1, "scoring reads whole sequences"
    device = next(model.parameters()).device
    iterator = iter(batches)
    with _only_norms_trained(model):
        pair = DistillationPair(model, vocab_size=vocab_size, kd_weight=0.0, ce_weight=1.0)
        pair.train()
        recorder = _Recorder(model, device, sample_aggregation)
        try:
            _run(pair, recorder, iterator, advance, device)
        finally:
            recorder.remove_hooks()
    return recorder.reduce()


def _run(
    pair: DistillationPair,
    recorder: "_Recorder",
    batches: Iterator[Batch],
    advance: Callable[[int], None] | None,
    device: torch.device,
) -> None:
    while True:
        found = list(islice(batches, micro_batches_per_pass()))
        samples = sum_over_replicas(len(found), device)
        if not samples:
            return
        recorder.begin(found)
        if found:
            run_micro_batches(pair, found, forward_only=False)
        recorder.finish()
        if advance:
            advance(samples)


@contextmanager
def _only_norms_trained(model: GPTModel) -> Iterator[None]:
    flags, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.requires_grad_(False)
    for weight in _norm_weights(model):
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)


def _norm_weights(model: GPTModel) -> list[torch.nn.Parameter]:
    layers = model.decoder.layers
    linears = [part for layer in layers for part in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1)]
    last = getattr(model.decoder, "final_layernorm", None)  # of the last pipeline stage
    return [linear.layer_norm_weight for linear in linears] + ([] if last is None else [last.weight])


class _Recorder:
    """Hooks on this rank's layers. `hidden` and `layers` are signed sums of the samples of one pass, of which other
    ranks hold parts; what a rank holds whole goes to its total at once."""

    def __init__(self, model: GPTModel, device: torch.device, aggregation: Aggregation) -> None:
        self.config, self.device, self.aggregation = model.config, device, aggregation
        self.stage = list(model.decoder.layers)
        config, tensor, count = self.config, model.config.tensor_model_parallel_size, len(self.stage)
        self.per_group = config.num_attention_heads // config.num_query_groups

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self.ffn = zeros(count, config.ffn_hidden_size // tensor)
        self.heads = zeros(count, config.num_attention_heads // tensor)
        self.groups = zeros(count, config.num_query_groups // tensor)
        self.hidden_total, self.layers_total = zeros(config.hidden_size), zeros(count)
        self.hidden, self.layers = zeros(0, config.hidden_size), zeros(0, count)
        self.seen = zeros(count, len(PLACES))  # sums of activations, which are finite where these are
        self.samples = zeros(2)
        self.influences = [BlockInfluence(device) for _ in self.stage]
        self.counts, self.masks = zeros(0), [torch.zeros(0)]
        self.current = -1  # the micro batch whose forward pass is under way
        self.norms = _norm_weights(model)
        self.differentiated = [0] * len(self.norms)  # how many samples of the pass each norm's weight has seen back
        self.handles: list[Any] = [model.register_forward_pre_hook(self._next)]
        self.handles += [handle for index in range(count) for handle in self._hooks(index)]
        self.handles += [weight.register_hook(self._norm_hook(index)) for index, weight in enumerate(self.norms)]

    def begin(self, batches: list[Batch]) -> None:
        """Make room for the samples of a pass."""
        valid = [valid_tokens(batch["labels"], batch["loss_mask"]).t() for batch in batches]
        self.counts = torch.tensor([int(v.sum()) for v in valid], dtype=torch.float64, device=self.device)
        if self.config.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            valid = [v.chunk(self.config.tensor_model_parallel_size)[rank] for v in valid]
        self.masks = [v.to(self.device) for v in valid]
        self.hidden = self.hidden.new_zeros(len(batches), self.hidden.shape[1])
        self.layers = self.layers.new_zeros(len(batches), self.layers.shape[1])
        self.samples[0] += (self.counts > 0).sum()
        self.samples[1] += self.counts.sum()
        self.current, self.differentiated = -1, [0] * len(self.norms)

    def _next(self, model: Any, inputs: Any) -> None:
        self.current += 1

    def _hooks(self, index: int) -> list[Any]:
        layer = self.stage[index]
        head_dim = self.config.kv_channels

        def add_heads(values: torch.Tensor, sample: int) -> None:
            heads = values.view(-1, head_dim).sum(1)
            self._add(self.heads[index], heads, sample)
            self._add(self.groups[index], heads.view(-1, self.per_group).sum(1), sample)

        def add_neurons(values: torch.Tensor, sample: int) -> None:
            self._add(self.ffn[index], values, sample)

        return [
            layer.self_attention.linear_qkv.register_forward_pre_hook(self._seen_hook(index, 0)),
            layer.self_attention.linear_proj.register_forward_pre_hook(self._input_hook(index, 1, add_heads)),
            layer.mlp.linear_fc1.register_forward_pre_hook(self._seen_hook(index, 2)),
            layer.mlp.linear_fc2.register_forward_pre_hook(self._input_hook(index, 3, add_neurons)),
            layer.register_forward_hook(self._layer_hook(index), with_kwargs=True),
        ]

    def _add(self, total: torch.Tensor, values: torch.Tensor, sample: int) -> None:
        """values: (units,) signed sums of one sample under the summed loss."""
        add_samples(total, (values / self.counts[sample].clamp(min=1)).abs().unsqueeze(0), self.aggregation)

    def _seen_hook(self, index: int, place: int) -> Callable:
        def hook(linear: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self.seen[index, place] += inputs[0].detach().sum() + linear.layer_norm_weight.detach().sum()

        return hook

    def _input_hook(self, index: int, place: int, add: Callable[[torch.Tensor, int], None]) -> Callable:
        def hook(linear: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sample, values = self.current, inputs[0].detach()
            self.seen[index, place] += values.sum()
            inputs[0].register_hook(lambda gradient: add(_products(values, gradient), sample))

        return hook

    def _norm_hook(self, index: int) -> Callable:
        # Megatron's schedules run the backward passes in the order of the forward passes.
        def hook(gradient: torch.Tensor) -> None:
            self.hidden[self.differentiated[index]] += gradient.double() * self.norms[index].detach().double()
            self.differentiated[index] += 1

        return hook

    def _layer_hook(self, index: int) -> Callable:
        def hook(layer: Any, inputs: tuple, keywords: dict, outputs: tuple[torch.Tensor, ...]) -> None:
            before = layer_input(inputs, keywords).detach()
            after, sample = outputs[0].detach(), self.current
            self.influences[index].update(before, after, self.masks[sample])

            def add(gradient: torch.Tensor) -> None:
                self.layers[sample, index] = _products(after - before, gradient).sum()

            outputs[0].register_hook(add)

        return hook

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()

    def finish(self) -> None:
        """Join the sums of the pass over the ranks that hold parts of them, and add them to the totals."""
        if len(self.counts):
            sums = torch.cat([self.hidden, self.layers], dim=1)
            if self.config.sequence_parallel:
                dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
            hidden, layers = (part.contiguous() for part in sums.split([self.hidden.shape[1], len(self.stage)], dim=1))
            if self.config.pipeline_model_parallel_size > 1:
                dist.all_reduce(hidden, group=parallel_state.get_pipeline_model_parallel_group())
            per_sample = self.counts.clamp(min=1).unsqueeze(1)
            add_samples(self.hidden_total, (hidden / per_sample).abs(), self.aggregation)
            add_samples(self.layers_total, (layers / per_sample).abs(), self.aggregation)
            for weight in self.norms:
                weight.grad = None
        totals = (self.ffn, self.heads, self.groups, self.hidden_total, self.layers_total)
        finite = bool(torch.stack([total.sum() for total in totals]).isfinite().all())
        require_finite(self.seen, self.stage[0].layer_number, self.config.num_layers, gradients=finite)

    def reduce(self) -> Scores:
        """The scores of the whole model, the same on every rank; as scoring's, each rank fills in what it holds."""
        config, layers = self.config, self.config.num_layers
        widths = [config.ffn_hidden_size, config.num_attention_heads, config.num_query_groups, 1]
        totals = torch.zeros(config.hidden_size + layers * sum(widths), dtype=torch.float64, device=self.device)
        hidden, *parts = totals.split([config.hidden_size, *(layers * width for width in widths)])
        ffn, heads, groups, of_layers = (part.view(layers, -1) for part in parts)
        sums = torch.zeros(2 * layers + 2, dtype=torch.float64, device=self.device)
        influence, samples = sums[:-2].view(layers, 2), sums[-2:]
        rank = parallel_state.get_tensor_model_parallel_rank()
        for index, layer in enumerate(self.stage):
            number = layer.layer_number - 1
            for whole, mine in ((ffn, self.ffn), (heads, self.heads), (groups, self.groups)):
                whole[number].view(-1, mine.shape[1])[rank] = mine[index]
            if rank == 0:
                of_layers[number] = self.layers_total[index]
            if rank == 0 or config.sequence_parallel:
                influence[number] = self.influences[index].sums
        if is_first_of_replica():
            hidden.copy_(self.hidden_total)
            samples.copy_(self.samples)
        dist.all_reduce(totals, op=dist.ReduceOp.MAX if self.aggregation is Aggregation.max else dist.ReduceOp.SUM)
        dist.all_reduce(sums)
        count, tokens = map(int, samples.tolist())
        hidden, ffn, heads, groups, of_layers = (
            over_samples(part.cpu(), count, self.aggregation) for part in (hidden, ffn, heads, groups, of_layers)
        )
        influence = influence.cpu()
        return Scores(
            hidden=hidden,
            ffn=ffn,
            heads=heads,
            kv_groups=groups,
            block_influence=influence[:, 0] / influence[:, 1],
            samples=count,
            tokens=tokens,
            taylor_layers=of_layers.flatten(),
        )


def _products(values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """(sequence, 1, channels) both. Returns (channels,) float64: the sum over tokens of their products."""
    return (values.float() * gradient.float()).sum((0, 1)).double()

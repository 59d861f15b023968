"""Losses inside the models: hooks that take hidden states, queries and keys where the layers live, and their losses.

Every pipeline stage computes the losses of its own layers, of teacher and student side by side; a pair of layers on
different stages is refused. A stage's sum enters the graph through `carry`, an identity on what the stage sends on, in
the manner of Megatron's MoEAuxLossAutoScaler, since the schedule has no other door for a loss on an earlier stage.

Under activation recompute the states between layers are those of the outer graph (a layer's checkpointed function gets
them as arguments), and what runs again in the backward pass is not taken again. Queries and keys exist inside the
checkpointed function alone: attention losses refuse recompute.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pipelines.config import UserError
from pipelines.core.attention_transfer import attention_loss
from pipelines.core.features import hidden_loss, relational_loss
from pipelines.model.layers import layer_input
from pipelines.model.projections import build_projections
from pipelines.signals import FeatureLoss, pipeline_stage


class FeatureLosses(torch.nn.Module):
    """The losses of this pipeline stage between a student's layers and its teacher's, with their projections.

    names: of all losses on all stages, in one order everywhere. factor: a number that all weights are multiplied by
    in `carry`. sums: what was found since `take_sums`.
    """

    def __init__(
        self, losses: Sequence[FeatureLoss], student: GPTModel, teacher: GPTModel, *, seed: int = 1234
    ) -> None:
        """Raises UserError where a pair of layers cannot be compared at this layout."""
        super().__init__()
        self.names = [loss.name for loss in losses]
        self.weights = {loss.name: loss.weight for loss in losses}
        self.factor = 1.0
        self.config = student.config
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        for loss in losses:
            _check(loss, student.config, teacher.config, stages)
        own = parallel_state.get_pipeline_model_parallel_rank()
        depth = student.config.num_layers
        self.losses = [loss for loss in losses if pipeline_stage(loss.student_layer, depth, stages) == own]
        width = teacher.config.hidden_size
        self.projections = build_projections(student.config, self.losses, teacher_width=width, seed=seed)
        self.sums = torch.zeros(len(losses), dtype=torch.float64, device=next(student.parameters()).device)
        self._taken: dict[tuple[str, str, int], Any] = {}
        self._taking = False
        for who, model, layers in (
            ("student", student, {(loss.heads is not None, loss.student_layer) for loss in self.losses}),
            ("teacher", teacher, {(loss.heads is not None, loss.teacher_layer) for loss in self.losses}),
        ):
            for attends, layer in sorted(layers):
                self._hook(who, model, attends, layer)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within it, forward passes of both models leave their states here, those of the last one each."""
        self._taken.clear()
        self._taking = True
        try:
            yield
        finally:
            self._taking = False

    def losses_of(self, valid: Tensor) -> dict[str, Tensor]:
        """{name: sum over valid tokens, a scalar fp32} of this stage's losses from the states taken last.

        valid: (batch, sequence) bool, of whole sequences. Each has a gradient where the student's states have. Under
        sequence parallelism those of hidden states are the sums over this rank's tokens. Collectives: those of core's
        losses, over the tensor-parallel group.
        """
        found = {}
        weights = valid.t().float()
        for loss in self.losses:
            student = self._taken["student", _what(loss), loss.student_layer]
            teacher = self._taken["teacher", _what(loss), loss.teacher_layer]
            found[loss.name] = self._loss(loss, student, teacher, weights)
        self._taken.clear()
        return found

    def carry(self, output: Tensor, found: dict[str, Tensor]) -> Tensor:
        """`output` unchanged; its backward pass adds the gradient of the weighted sum of the losses, once.

        Their upstream gradient is 1, as the loss's own under calculate_per_token_loss without a loss scale. Adds to
        `sums`. A factor of 0 still gives every projection its gradient of zeros: Megatron waits for each one.
        """
        for name, value in found.items():
            self.sums[self.names.index(name)] += value.detach().double().to(self.sums.device)
        if not found or not torch.is_grad_enabled():
            return output
        total = sum(self.factor * self.weights[name] * value for name, value in found.items())
        return _Carry.apply(output, total)

    def across_tokens(self) -> bool:
        """Whether a loss compares the tokens of a row with each other, whichever documents they are of."""
        return any(loss.across_tokens for loss in self.losses)

    def take_sums(self) -> Tensor:
        """(names,) fp64: each loss's sums over the valid tokens of this data-parallel rank's micro batches since the
        last call; 0 for those of other stages. Under sequence parallelism one all-reduce over the tensor group."""
        taken = self.sums.clone()
        self.sums.zero_()
        if self.config.sequence_parallel:
            if parallel_state.get_tensor_model_parallel_rank() > 0:
                for loss in self.losses:
                    if loss.heads is not None:  # replicated, while the others are sums over the rank's own tokens
                        taken[self.names.index(loss.name)] = 0
            torch.distributed.all_reduce(taken, group=parallel_state.get_tensor_model_parallel_group())
        return taken

    def _loss(self, loss: FeatureLoss, student: Any, teacher: Any, weights: Tensor) -> Tensor:
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        if loss.heads is not None:
            return attention_loss(student, teacher, weights, kind=loss.kind, heads=loss.heads, group=tensor_group)
        split = self.config.sequence_parallel
        if loss.kind == "relational":
            return relational_loss(student, teacher, weights, group=tensor_group if split else None)
        if split:
            ranks, rank = torch.distributed.get_world_size(tensor_group), torch.distributed.get_rank(tensor_group)
            weights = weights.chunk(ranks)[rank]
        factors = self.projections[loss.name]() if loss.name in self.projections else []
        return hidden_loss(student, teacher, weights, kind=loss.kind, factors=factors)

    def _hook(self, who: str, model: GPTModel, attends: bool, layer: int) -> None:
        layers = {module.layer_number: module for module in model.decoder.layers}
        if attends:
            key = (who, "attention", layer)
            layers[layer].self_attention.core_attention.register_forward_pre_hook(self._taker(key, inputs=2))
        elif layer + 1 in layers:
            layers[layer + 1].register_forward_pre_hook(self._layer_taker((who, "hidden", layer)), with_kwargs=True)
        elif model.decoder.final_layernorm is not None:
            model.decoder.final_layernorm.register_forward_pre_hook(self._taker((who, "hidden", layer), inputs=1))
        else:
            model.decoder.register_forward_hook(self._output_taker((who, "hidden", layer)))

    def _taker(self, key: tuple[str, str, int], inputs: int) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            if self._taking:
                self._taken[key] = arguments[0] if inputs == 1 else arguments[:inputs]

        return hook

    def _layer_taker(self, key: tuple[str, str, int]) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if self._taking:
                self._taken[key] = layer_input(arguments, keywords)

        return hook

    def _output_taker(self, key: tuple[str, str, int]) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            if self._taking:
                self._taken[key] = output

        return hook


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), device=gradient.device)


def _what(loss: FeatureLoss) -> str:
    return "hidden" if loss.heads is None else "attention"


def _check(loss: FeatureLoss, student: TransformerConfig, teacher: TransformerConfig, stages: int) -> None:
    own = pipeline_stage(loss.student_layer, student.num_layers, stages)
    other = pipeline_stage(loss.teacher_layer, teacher.num_layers, stages)
    if own != other:
        raise UserError(
            f"{loss.name}: expected both layers on one of the {stages} pipeline stages, found student layer "
            f"{loss.student_layer} on stage {own} and teacher layer {loss.teacher_layer} on stage {other}. Pair layers "
            "at the same share of the depth, or lower parallel.pipeline."
        )
    if loss.heads is not None and student.recompute_granularity == "full":
        raise UserError(
            f"{loss.name}: expected no recompute, found full. Queries and keys exist inside the layer alone: set "
            "distil.recompute=false, or compare hidden states."
        )
    if student.context_parallel_size > 1 and loss.across_tokens:
        raise UserError(
            f"{loss.name}: expected parallel.context=1, found {student.context_parallel_size}: it compares whole "
            "sequences."
        )

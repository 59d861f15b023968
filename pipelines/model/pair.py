"""Teacher and student as shards in the same process groups, seen by Megatron's schedules as one model with one loss."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.profiler import record_function

from pipelines.core.family import divergence_named
from pipelines.core.linear_divergence import LinearTerms, linear_divergence
from pipelines.core.loss import LossWeights, valid_tokens
from pipelines.core.vocab_parallel import Shard, align_columns
from pipelines.model.projections import Read, sharded_state_dict
from pipelines.model.signals import FeatureLosses

TERMS = ("loss", "kd", "ce", "agreement")
PROJECTIONS = "projections."  # before the names of what is trained beside the student


class DistillationPair(MegatronModule):
    """A trained student and, for distillation, a frozen teacher. Without a teacher: plain language-model training.

    forward gives, on the last pipeline stage, {"loss": the sum over valid tokens, a scalar; "token_loss", "kd", "ce",
    "agreement": (batch, sequence) fp32, unmasked}. Only "loss" carries a gradient. In training mode a term whose weight
    is 0 is neither computed nor returned (kd_weight 0 spares the teacher's forward too); in eval mode every term that
    the models at hand allow is, and with a teacher what core/divergence.py's Telemetry names besides. Logits are never
    whole: the loss starts from the hidden states and the heads (core/linear_divergence.py), and the gradients of both
    are computed with it. Under Megatron's DistributedDataParallel the head's goes straight into its `main_grad`, in the
    forward pass.

    On earlier stages it gives the hidden states for the next stage, (sequence, batch, student hidden + teacher hidden),
    student's first; `config` says that size to the schedule. The two models may differ in dtype: the teacher's states
    travel bit by bit in the student's dtype, in as many columns as their bytes fill.

    .config is the object that Megatron's schedule reads: the student's own without pipeline parallelism, a copy of
    another hidden_size with it. So finalize_model_grads_func and the like must be set on `pair.config`.

    features: losses between layers of the two models, which enter the backward pass on their own pipeline stage and are
    in none of the terms; see model/signals.py.

    The teacher has no gradients, is in eval mode, and is no submodule: .train(), .to(), .bfloat16() and what casts
    whole modules (Megatron's Float16Module) leave it alone, and it is in no state dict. state_dict, load_state_dict and
    sharded_state_dict are the student's, with the student's names. The last two hold the projections of `features`
    besides.
    """

    teacher: GPTModel | None

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel | None = None,
        *,
        vocab_size: int,
        config: TransformerConfig | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        temperature_squared: bool = True,
        divergence: str = "forward_kl",
        divergence_parameter: float | None = None,
        top_k: int | None = None,
        gradient_filter: float | None = None,
        features: FeatureLosses | None = None,
    ) -> None:
        """vocab_size: token ids that both models know, without padding; columns beyond are left out of the loss.
        config: what `schedule_config` gave for these two, where a trainer needs the object before the models are built.
        divergence, divergence_parameter: see core/family.py. gradient_filter: filter_below of `linear_divergence`.

        Raises ValueError for weights that make no loss, or a divergence without a teacher.
        """
        if teacher is None and kd_weight:
            raise ValueError(f"kd_weight: expected 0 without a teacher, found {kd_weight}.")
        super().__init__(config or schedule_config(student.config, teacher.config if teacher is not None else None))
        self.weights = LossWeights(
            kd_weight,
            ce_weight,
            temperature,
            temperature_squared,
            divergence_named(divergence, divergence_parameter),
            top_k,
        )
        self.vocab_size, self.gradient_filter = vocab_size, gradient_filter
        self.student, self.features = student, features
        object.__setattr__(self, "teacher", teacher)  # torch would register it as a submodule
        self.head = Read(head_weight(student)) if student.post_process else None
        # t of TAID while training, a number or a tensor without dims; like `weights`, whoever schedules it sets it.
        self.teacher_share: Tensor | float | None = None
        self._aligned_teacher_head: Tensor | None = None
        self.model_type = ModelType.encoder_or_decoder
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """tokens, position_ids, labels: (batch, sequence) int64. labels are shifted already: labels[:, i] follows
        tokens[:, i]; -100 where there is none. loss_mask: (batch, sequence); a token counts where it is not 0 and the
        label is not -100; None: every token with a label does. packed_seq_params: of both models, where documents stand
        alone (model/documents.py).

        Collectives besides the models' own, on the last stage and over the tensor-parallel group: those of
        `linear_divergence`. Terms are replicated over that group.
        """
        if packed_seq_params is not None and self.features is not None and self.features.across_tokens():
            raise ValueError("documents apart: expected no loss on attention or relations, found one. Leave it out.")
        teacher = None
        followed = bool(self.weights.kd) or not self.training  # at the head
        loss_mask = torch.ones_like(labels) if loss_mask is None else loss_mask
        with nullcontext() if self.features is None else self.features.taking():
            if self.teacher is not None and (followed or self.features is not None):
                with torch.no_grad(), record_function("teacher forward"):
                    teacher = hidden_states(self.teacher, tokens, position_ids, packed_seq_params)
            with record_function("student forward"):
                student = hidden_states(self.student, tokens, position_ids, packed_seq_params)
        if self.features is not None:
            student = self.features.carry(student, self.features.losses_of(valid_tokens(labels, loss_mask)))
        if self.post_process:
            with record_function("loss"):  # its gradients for hidden states and head included
                return self._terms(student, teacher if followed else None, labels, loss_mask)
        if self.teacher is None:
            return student
        if teacher is None:
            teacher = student.new_zeros(*student.shape[:-1], self.config.hidden_size - student.shape[-1])
        return torch.cat([student, teacher.contiguous().view(student.dtype)], dim=-1)

    def _terms(self, student: Tensor, teacher: Tensor | None, labels: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
        """student, teacher: (sequence, batch, own hidden size), or this rank's part of the sequence."""
        assert self.head is not None
        (head,) = self.head()
        into = self._head_gradient(head)
        by_sequence = labels.t().reshape(-1)
        terms = linear_divergence(
            student.flatten(0, 1),
            head if into is None else head.detach(),
            None if teacher is None else teacher.flatten(0, 1),
            None if teacher is None else self._teacher_head(head.shape[0]),
            by_sequence if self.weights.ce or not self.training else None,
            valid_tokens(by_sequence, loss_mask.t().reshape(-1)).float(),
            kd_scale=self.weights.kd_scale,
            ce_scale=self.weights.ce,
            temperature=self.weights.temperature,
            divergence=self.weights.divergence,
            top_k=self.weights.top_k,
            teacher_share=self.teacher_share if self.training else None,
            shard=self._shard(head.shape[0]),
            sequence_parallel=self.student.config.sequence_parallel,
            head_gradient=into,
            telemetry=not self.training and teacher is not None,
            filter_below=self.gradient_filter,
        )
        loss = terms.loss
        # A tied head on the embedding's own stage gets a gradient from the embedding: autograd knows of it already.
        if into is not None and not (self.share_embeddings_and_output_weights and self.pre_process):
            loss = _InMainGrad.apply(loss, head)
        return {"loss": loss} | self._by_batch(terms, labels.shape)

    def _by_batch(self, terms: LinearTerms, shape: torch.Size) -> dict[str, Tensor]:
        """The terms per token: (sequence * batch,) -> (batch, sequence)."""
        found = {"token_loss": terms.token_loss, "kd": terms.kd, "ce": terms.ce, "agreement": terms.agreement}
        if terms.telemetry is not None:
            found |= terms.telemetry._asdict()
        batch, sequence = shape
        return {n: t.view(sequence, batch).t().contiguous() for n, t in found.items() if t is not None}

    def _shard(self, width: int) -> Shard:
        return Shard.uniform(width, self.vocab_size, parallel_state.get_tensor_model_parallel_group())

    def _head_gradient(self, head: Tensor) -> Tensor | None:
        """Where the head's gradient is to be added while training under DistributedDataParallel, in fp32."""
        main_grad = getattr(head, "main_grad", None)
        if not self.training or not torch.is_grad_enabled() or not head.requires_grad or main_grad is None:
            return None
        return main_grad if main_grad.dtype == torch.float32 else None

    def _teacher_head(self, width: int) -> Tensor:
        """The teacher's head in rows of the student's shards: its own, or once and for all a copy where the padding of
        the two vocabularies differs."""
        assert self.teacher is not None
        head = head_weight(self.teacher).detach()
        if head.shape[0] == width:
            return head
        if self._aligned_teacher_head is None:
            group = parallel_state.get_tensor_model_parallel_group()
            self._aligned_teacher_head = align_columns(head.t(), width, self.vocab_size, group).t().contiguous()
        return self._aligned_teacher_head

    # What Megatron's schedules ask of a model.

    @property
    def pre_process(self) -> bool:
        return bool(self.student.pre_process)

    @property
    def post_process(self) -> bool:
        return bool(self.student.post_process)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return bool(self.student.share_embeddings_and_output_weights)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.student.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """input_tensor: what the previous stage's forward returned; None on the first stage."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if tensor is None or self.teacher is None:
            student, teacher = tensor, None
        else:
            student_hidden = self.student.config.hidden_size
            student = tensor[..., :student_hidden].contiguous()
            teacher = tensor[..., student_hidden:].detach().contiguous().view(self.teacher.config.pipeline_dtype)
        self.student.set_input_tensor([student])
        if self.teacher is not None:
            self.teacher.set_input_tensor([teacher])

    # Checkpoints hold the student alone, under the names of a plain GPTModel.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.student.state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.student.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        state = self.student.sharded_state_dict(prefix, *args, **kwargs)
        if self.features is not None:
            state |= sharded_state_dict(self.features.projections, f"{prefix}{PROJECTIONS}")
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        own = {name: value for name, value in state_dict.items() if name.startswith(PROJECTIONS)}
        if self.features is not None:
            named = {name.removeprefix(PROJECTIONS): value for name, value in own.items()}
            self.features.projections.load_state_dict(named, strict=strict)
        rest = {name: value for name, value in state_dict.items() if name not in own}
        return self.student.load_state_dict(rest, strict=strict, **kwargs)


def hidden_states(
    model: GPTModel, tokens: Tensor, position_ids: Tensor, packed_seq_params: PackedSeqParams | None = None
) -> Tensor:
    """The model's forward up to its output layer: (sequence, batch, hidden), normed on the last pipeline stage.

    Under sequence parallelism this rank's part of the sequence. Collectives: the layers' own.
    """
    last = model.post_process
    model.post_process = False  # of the GPTModel: the output layer; its decoder still applies the final norm
    try:
        return model(tokens, position_ids, None, packed_seq_params=packed_seq_params)
    finally:
        model.post_process = last


def head_weight(model: GPTModel) -> torch.nn.Parameter:
    """The output layer's weight on the last pipeline stage, (padded vocabulary / tp, hidden): its own or the shared."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


class _InMainGrad(torch.autograd.Function):
    """Tells DistributedDataParallel that a weight's gradient is in its main_grad already.

    Its hook runs when the weight gets a gradient, and with overlapped reduction insists on one: backward gives a
    stand-in, which the hook drops, or adds where Megatron's `zero_out_wgrad` says that it is to be zero.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight = ctx.weight
        weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return gradient, make(weight)


def schedule_config(student: TransformerConfig, teacher: TransformerConfig | None) -> TransformerConfig:
    """The config by which Megatron's schedule sizes what the pipeline stages send each other, in the student's dtype.

    Without pipeline parallelism or without a teacher it is the student's own object. Raises ValueError where the two
    cannot share a schedule.
    """
    if teacher is None:
        return student
    for field in ("sequence_parallel", "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(student, field) != getattr(teacher, field):
            raise ValueError(
                f"teacher and student: expected the same {field}, found {getattr(teacher, field)} and "
                f"{getattr(student, field)}."
            )
    if student.pipeline_model_parallel_size == 1:
        return student
    own, others = student.pipeline_dtype.itemsize, teacher.hidden_size * teacher.pipeline_dtype.itemsize
    if others % own:
        raise ValueError(
            f"teacher: expected an even hidden size in bf16 beside a student in fp32, found {teacher.hidden_size}. "
            "Give both one precision, or leave pipeline parallelism out."
        )
    config = copy.copy(student)
    config.hidden_size = student.hidden_size + others // own
    return config

"""Teacher and student as shards in the same process groups, seen by Megatron's schedules as one model with one loss."""

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pipelines.core.loss import LossWeights, distillation_terms
from pipelines.core.vocab_parallel import Shard, align_columns

TERMS = ("loss", "kd", "ce", "agreement")


class DistillationPair(MegatronModule):
    """A trained student and, for distillation, a frozen teacher. Without a teacher: plain language-model training.

    forward gives, on the last pipeline stage, per-token terms {name: (batch, sequence) fp32}, names from TERMS. Only
    "loss" carries a gradient. In training mode a term whose weight is 0 is neither computed nor returned (kd_weight 0
    spares the teacher's forward too); in eval mode every term that the models at hand allow is. The loss is computed
    here, not in the loss function, because Float16Module casts what the last stage returns to fp32.

    On earlier stages it gives the hidden states for the next stage, (sequence, batch, student hidden + teacher hidden),
    student's first; `config` says that size to the schedule.

    .config is the object that Megatron's schedule reads: the student's own without pipeline parallelism, a copy of
    another hidden_size with it. So finalize_model_grads_func and the like must be set on `pair.config`.

    The teacher has no gradients, stays in eval mode under .train(), and is in no state dict: state_dict,
    load_state_dict and sharded_state_dict are the student's, with the student's names.
    """

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
    ) -> None:
        """vocab_size: token ids that both models know, without padding; columns beyond are left out of the loss.
        config: what `schedule_config` gave for these two, where a trainer needs the object before the models are built.

        Raises ValueError for weights that make no loss, or a divergence without a teacher.
        """
        if teacher is None and kd_weight:
            raise ValueError(f"kd_weight: expected 0 without a teacher, found {kd_weight}.")
        super().__init__(config or schedule_config(student.config, teacher.config if teacher is not None else None))
        self.weights = LossWeights(kd_weight, ce_weight, temperature, temperature_squared)
        self.vocab_size = vocab_size
        self.student, self.teacher = student, teacher
        self.model_type = ModelType.encoder_or_decoder
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

    def forward(
        self, tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor | None = None
    ) -> dict[str, Tensor] | Tensor:
        """tokens, position_ids, labels: (batch, sequence) int64. labels are shifted already: labels[:, i] follows
        tokens[:, i]; -100 where there is none. loss_mask is taken so that a whole batch can be passed; the terms
        are unmasked.

        Collectives besides the models' own: two all-reduces over the tensor-parallel group, in the forward pass of the
        last stage; one all-to-all more where the two vocabularies are padded differently. Replicated over that group.
        """
        teacher = None
        if self.teacher is not None and (self.weights.kd or not self.training):
            with torch.no_grad():
                teacher = self.teacher(tokens, position_ids, None)
        student = self.student(tokens, position_ids, None)
        if self.post_process:
            return self._terms(student, teacher, labels)
        if self.teacher is None:
            return student
        if teacher is None:
            teacher = student.new_zeros(*student.shape[:-1], self.teacher.config.hidden_size)
        return torch.cat([student, teacher], dim=-1)

    def _terms(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """student, teacher: logits (batch, sequence, padded vocabulary / tp)."""
        group = parallel_state.get_tensor_model_parallel_group()
        width = student.shape[-1]
        if teacher is not None:
            teacher = align_columns(teacher.flatten(0, 1), width, self.vocab_size, group)
        terms = distillation_terms(
            student.flatten(0, 1),
            teacher,
            labels.flatten() if self.weights.ce or not self.training else None,
            self.weights,
            Shard.uniform(width, self.vocab_size, group),
        )
        return {name: term.view(labels.shape) for name, term in zip(TERMS, terms, strict=True) if term is not None}

    def train(self, mode: bool = True) -> "DistillationPair":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

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
            teacher = tensor[..., student_hidden:].detach().contiguous()
        self.student.set_input_tensor([student])
        if self.teacher is not None:
            self.teacher.set_input_tensor([teacher])

    # Checkpoints hold the student alone, under the names of a plain GPTModel.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.student.state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.student.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.student.sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        return self.student.load_state_dict(state_dict, strict=strict, **kwargs)


def schedule_config(student: TransformerConfig, teacher: TransformerConfig | None) -> TransformerConfig:
    """The config by which Megatron's schedule sizes what the pipeline stages send each other.

    Without pipeline parallelism or without a teacher it is the student's own object. Raises ValueError where the two
    cannot share a schedule.
    """
    if teacher is None:
        return student
    for field in ("sequence_parallel", "pipeline_dtype", "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(student, field) != getattr(teacher, field):
            raise ValueError(
                f"teacher and student: expected the same {field}, found {getattr(teacher, field)} and "
                f"{getattr(student, field)}."
            )
    if student.pipeline_model_parallel_size == 1:
        return student
    config = copy.copy(student)
    config.hidden_size = student.hidden_size + teacher.hidden_size
    return config

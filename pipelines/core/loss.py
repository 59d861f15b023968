"""The loss of distillation: named weights, temperature, and the one place where masking and averaging happen.

    loss = kd_weight * T^2 * D(teacher, student, T) + ce_weight * CE(labels, student)

with D a divergence of family.py, forward KL unless another is asked for,
averaged over all valid tokens of the global batch (data-parallel ranks and micro batches), every term by one count.
The T^2 keeps the gradient's size while T changes (arXiv 1503.02531, section 2) and can be switched off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.core.divergence import TokenTerms, token_terms
from pipelines.core.family import FORWARD_KL, Divergence
from pipelines.core.vocab_parallel import IGNORED_LABEL, Shard


@dataclass(frozen=True)
class LossWeights:
    """kd: of the divergence from the teacher; ce: of the cross-entropy with the labels. A weight of 0 costs nothing.

    top_k: the divergence over the teacher's k most likely ids and one bucket for all others; None: over all ids.
    """

    kd: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = True
    divergence: Divergence = FORWARD_KL
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.kd < 0 or self.ce < 0 or self.kd + self.ce == 0:
            raise ValueError(
                f"loss weights: expected kd_weight and ce_weight of 0 or more and one of them above 0, found "
                f"kd_weight={self.kd}, ce_weight={self.ce}."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, found {self.temperature}.")

    @property
    def kd_scale(self) -> float:
        """What the divergence is multiplied by: the weight, times T^2 unless that is switched off."""
        return self.kd * self.temperature**2 if self.temperature_squared else self.kd


def loss_identity(weights: LossWeights) -> str:
    """The loss in words, for the log: what is minimized, with every weight."""
    factor = "T^2 * " if weights.temperature_squared else ""
    divergence = weights.divergence.words(weights.temperature)
    buckets = f" over the teacher's top {weights.top_k} and the rest" if weights.top_k else ""
    return f"loss = {float(weights.kd)} * {factor}{divergence}{buckets} + {float(weights.ce)} * CE"


def distillation_terms(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, weights: LossWeights, shard: Shard
) -> TokenTerms:
    """`divergence.token_terms` under named weights: shapes, collectives and errors as there.

    A teacher or labels whose weight is 0 are measured without entering the loss; pass None to skip their work.
    """
    return token_terms(
        student_logits,
        teacher_logits,
        labels,
        kd_scale=weights.kd_scale,
        ce_scale=weights.ce,
        temperature=weights.temperature,
        shard=shard,
        divergence=weights.divergence,
        top_k=weights.top_k,
    )


def valid_tokens(labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Which tokens count, as bool of the labels' shape: the mask is not 0 and the label is not -100."""
    return (loss_mask != 0) & (labels != IGNORED_LABEL)


def masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    """The sum of `values` over valid tokens, a scalar; masked values may be anything, NaN included."""
    return torch.where(valid, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()

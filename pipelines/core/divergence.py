"""Forward KL and cross-entropy of vocabulary-sharded logits: nats per token, with gradients in closed form.

    p = softmax(teacher / T), q = softmax(student / T), both over the vocabulary without its padding
    KL(teacher || student) = sum_v p_v (log p_v - log q_v)        d KL / d student_v = (q_v - p_v) / T
    CE                     = -log softmax(student)_label          d CE / d student_v = softmax(student)_v - [v = label]

(arXiv 1503.02531, section 2.) With z = logits / T - max(logits / T) and Z = sum_v exp(z_v), the sums over shards that
KL needs are Z_teacher, Z_student and sum_v exp(z_teacher) (z_teacher - z_student):

    KL = sum_v exp(z_teacher) (z_teacher - z_student) / Z_teacher - log Z_teacher + log Z_student

which is exactly 0 for equal logits. The gradients need no collective: each rank writes its own columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from pipelines.core.vocab_parallel import IGNORED_LABEL, Shard, greatest, reduce_over_shards


class TokenTerms(NamedTuple):
    """One number per token, (tokens,) fp32, replicated over the shard's group. None: not asked for.

    loss: kd_scale * kd + ce_scale * ce, and the only one that carries a gradient. kd: KL(teacher || student) at
    temperature T, without T^2. ce: cross-entropy at temperature 1, 0 where the label is -100. agreement: 1 where
    teacher and student have the same most likely token, else 0.
    """

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    agreement: Tensor | None


def token_terms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    kd_scale: float,
    ce_scale: float,
    temperature: float,
    shard: Shard,
) -> TokenTerms:
    """Per-token KL, cross-entropy, agreement and their weighted sum.

    student_logits: (tokens, vocab / tp) of any floating dtype; arithmetic is fp32, the gradient has the logits' dtype.
    teacher_logits: the same columns, no gradient; None: neither kd nor agreement is computed.
    labels: (tokens,) int64 token ids or -100; None: ce is not computed. A scale of 0 costs no gradient work.

    Collectives over shard.group: forward one MAX all-reduce (int64, at most 2 * tokens) and one SUM all-reduce (fp32,
    at most 5 * tokens); backward none. Raises ValueError where the shapes do not fit.
    """
    if teacher_logits is None and labels is None:
        raise ValueError("token_terms: expected teacher logits, labels or both, found neither.")
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits: expected the student's shape {tuple(student_logits.shape)}, found "
            f"{tuple(teacher_logits.shape)}. Where only the padding of the vocabulary differs, align_columns helps."
        )
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, found {temperature}.")
    if teacher_logits is None:
        temperature = 1.0  # only the divergence has one; spares the second exponential
    return TokenTerms(
        *_TokenTerms.apply(student_logits, teacher_logits, labels, kd_scale, ce_scale, temperature, shard)
    )


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        kd_scale: float,
        ce_scale: float,
        temperature: float,
        shard: Shard,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        maxima, ids = greatest((student,) if teacher is None else (student, teacher), shard)
        local = _LocalShard(student, teacher, labels, maxima, temperature, shard)
        sums = local.sums()
        kd, ce = local.kd(sums), local.ce(sums)
        agreement = (ids[0] == ids[1]).float() if teacher is not None else None
        loss = torch.zeros_like(maxima[0])
        if kd is not None and kd_scale:
            loss += kd_scale * kd
        if ce is not None and ce_scale:
            loss += ce_scale * ce
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(local.gradient(sums, kd_scale, ce_scale).to(student.dtype))
        ctx.mark_non_differentiable(*(term for term in (kd, ce, agreement) if term is not None))
        return loss, kd, ce, agreement

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd's version counter turns a second backward through the same graph into an error.
        gradient.mul_(loss_gradient.unsqueeze(1))
        return gradient, None, None, None, None, None, None


class _LocalShard:
    """The exponentials of one rank's columns: fp32 buffers (tokens, width) that end as the gradient.

    student, teacher: exp(z) at temperature T. student_at_1: exp(z) at temperature 1, the same buffer when T is 1.
    At most three buffers live at once (four with cross-entropy at T != 1). Both models take the same operations on
    buffers of the same layout, which is what makes the divergence of equal logits exactly 0.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        maxima: Tensor,
        temperature: float,
        shard: Shard,
    ) -> None:
        self.shard, self.temperature, self.labels = shard, temperature, labels
        self.width = shard.valid_width(student.shape[1])
        self.buffer = _below_maximum(student, maxima[0], self.width)
        self.student = self.buffer[:, : self.width]
        self.label_logits = self._pick_labels() if labels is not None else None
        at_1 = self.student.exp() if labels is not None and temperature != 1 else None
        self.student.div_(temperature)
        self.teacher = self.cross = None
        if teacher is not None:
            self.teacher = _below_maximum(teacher, maxima[1], self.width)[:, : self.width].div_(temperature)
            difference = self.teacher - self.student
            self.cross = difference.mul_(self.teacher.exp_()).sum(dim=1)
            del difference
        self.student.exp_()
        self.student_at_1 = self.student if at_1 is None else at_1

    def _pick_labels(self) -> Tensor:
        """(tokens,) logit of the label minus the greatest logit; 0 on every rank but the one that holds the label."""
        assert self.labels is not None
        if self.width == 0:
            return torch.zeros(self.labels.shape, device=self.labels.device)
        columns, here = self.shard.local_columns(self.labels, self.width)
        return torch.where(here, self.student.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)

    def sums(self) -> dict[str, Tensor]:
        """Sums over the whole vocabulary, (tokens,) each: one SUM all-reduce of at most five of them."""
        rows = {"student": self.student.sum(dim=1)}
        if self.teacher is not None and self.cross is not None:
            rows |= {"teacher": self.teacher.sum(dim=1), "cross": self.cross}
        if self.label_logits is not None:
            rows["label"] = self.label_logits
            if self.student_at_1 is not self.student:
                rows["student_at_1"] = self.student_at_1.sum(dim=1)
        reduced = reduce_over_shards(torch.stack(list(rows.values())), ReduceOp.SUM, self.shard)
        sums = dict(zip(rows, reduced, strict=True))
        sums.setdefault("student_at_1", sums["student"])
        return sums

    def kd(self, sums: dict[str, Tensor]) -> Tensor | None:
        if self.teacher is None:
            return None
        return sums["cross"] / sums["teacher"] - (sums["teacher"].log() - sums["student"].log())

    def ce(self, sums: dict[str, Tensor]) -> Tensor | None:
        if self.labels is None:
            return None
        return torch.where(self.labels != IGNORED_LABEL, sums["student_at_1"].log() - sums["label"], 0.0)

    def gradient(self, sums: dict[str, Tensor], kd_scale: float, ce_scale: float) -> Tensor:
        """(tokens, width) d loss / d student logits, written over the buffers of the exponentials:

        kd_scale / T * (q - p) + ce_scale * (softmax(student) - onehot(label)); the last part 0 where the label is -100.
        """
        kd_factor = kd_scale / self.temperature if self.teacher is not None else 0.0
        ce_factor = torch.zeros_like(sums["student"])
        if self.labels is not None and ce_scale:
            ce_factor = ce_scale * (self.labels != IGNORED_LABEL).float()
        if self.student_at_1 is self.student:
            self.student.mul_(((kd_factor + ce_factor) / sums["student"]).unsqueeze(1))
        else:
            self.student.mul_((kd_factor / sums["student"]).unsqueeze(1))
            if ce_scale:
                self.student.addcmul_(self.student_at_1, (ce_factor / sums["student_at_1"]).unsqueeze(1))
        if kd_factor and self.teacher is not None:
            self.student.addcmul_(self.teacher, (kd_factor / sums["teacher"]).unsqueeze(1), value=-1)
        if self.labels is not None and ce_scale and self.width:
            columns, here = self.shard.local_columns(self.labels, self.width)
            self.student.scatter_add_(1, columns.unsqueeze(1), (-ce_factor * here).unsqueeze(1))
        return self.buffer


def _below_maximum(logits: Tensor, maxima: Tensor, width: int) -> Tensor:
    """logits - maxima in a new fp32 buffer of the logits' shape; columns from `width` on are 0."""
    buffer = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    torch.sub(logits[:, :width], maxima.unsqueeze(1), out=buffer[:, :width])
    buffer[:, width:] = 0
    return buffer

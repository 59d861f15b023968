"""Distillation from hidden states: heads, divergence, cross-entropy and all gradients, never a (tokens, vocabulary)
tensor.

The tokens go through in chunks. For each chunk both heads make their logits in one buffer each, divergence.py reduces
them to numbers per token, the gradient is written over the student's logits, and two products take it to the hidden
states and to the head. So the gradients are there when the loss is, for an upstream gradient of one; backward scales
them by what it is given. That is why the tokens' weights go in and a sum comes out: a gradient per token could not be
scaled afterwards.

Order of tokens. Under sequence parallelism the hidden states are this rank's part, tokens r * n / tp to
(r + 1) * n / tp of n, r being its rank in shard.group; labels and weights are those of all n tokens in that order, the
same on every rank. A chunk takes as many tokens of every rank.

Collectives over shard.group, for each chunk of c tokens (none for a group of one):
    numbers per token    as `divergence.measure`: one all-gather, two where the divergence needs it, and one more
                         for each of top_k and teacher_share
    replicated hidden    one all-reduce of (c, hidden), which runs while the head's gradient and the next chunk are made
    sequence parallel    one all-gather of (c, hidden) per model, made while the chunk before is computed, and one
                         reduce-scatter of (c, hidden) in the place of the all-reduce
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.core import products
from pipelines.core.chunk import Chunk, Kernels, Normalizers
from pipelines.core.divergence import Telemetry, check, greatest, make_chunk, measure, weighted
from pipelines.core.family import FORWARD_KL, Divergence
from pipelines.core.filter import columns_of, live_columns
from pipelines.core.kernels import kernels_for
from pipelines.core.streams import Gradients, Rows
from pipelines.core.vocab_parallel import Shard

# Of one buffer of logits, fp32: what a processor's cache and a GPU's matrix units like.
CHUNK_BYTES = {"cpu": 32 << 20}
CHUNK_BYTES_ELSEWHERE = 256 << 20
# From here on more tokens make a processor's products no faster: a narrow shard needs no full buffer.
CHUNK_TOKENS = {"cpu": 256}


class LinearTerms(NamedTuple):
    """loss: the sum over tokens of token_weights * (kd_scale * kd + ce_scale * ce), fp32, and the only one that carries
    a gradient. token_loss: that sum's addends without their weights. The others as in divergence.TokenTerms: (tokens,)
    fp32, replicated over the shard's group, None where not asked for."""

    loss: Tensor
    token_loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    agreement: Tensor | None
    telemetry: Telemetry | None


class _Settings(NamedTuple):
    kd_scale: float
    ce_scale: float
    temperature: float
    divergence: Divergence
    shard: Shard
    top_k: int | None
    teacher_share: Tensor | float | None
    chunk_tokens: int | None
    sequence_parallel: bool
    head_gradient: Tensor | None
    filter_below: float | None
    telemetry: bool
    kernels: Kernels
    with_gradient: bool


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor,
    *,
    kd_scale: float,
    ce_scale: float,
    temperature: float,
    shard: Shard,
    divergence: Divergence = FORWARD_KL,
    top_k: int | None = None,
    teacher_share: Tensor | float | None = None,
    chunk_tokens: int | None = None,
    sequence_parallel: bool = False,
    head_gradient: Tensor | None = None,
    filter_below: float | None = None,
    telemetry: bool = False,
    kernels: Kernels | None = None,
) -> LinearTerms:
    """Loss and gradients of a student's head and hidden states, held to a teacher's, to labels, or to both.

    student_hidden, teacher_hidden: (tokens, own hidden size) after the final norm, of one dtype with their heads; under
    sequence_parallel (tokens / tp, own hidden size). student_head, teacher_head: (vocab / tp, own hidden size), padding
    included. Teacher None: cross-entropy alone; it never gets a gradient.
    labels: (tokens,) int64 token ids or -100; None: no cross-entropy. token_weights: (tokens,), 0 where a token does
    not count: its loss may be anything. kd_scale, ce_scale, temperature, divergence, top_k, telemetry, kernels:
    as divergence.token_terms.
    teacher_share: t of TAID (arXiv 2501.16937, equation 3): the target's logits are (1 - t) * student + t * teacher, in
    which the student carries no gradient; kd is the divergence from it, agreement remains with the teacher. A tensor
    without dims is read on its device.
    chunk_tokens: tokens per chunk, over all ranks; None: by the size of a buffer.
    head_gradient: (vocab / tp, hidden) fp32, to which the head's gradient is added in the forward pass at once; the
    head gets none by autograd then. An upstream gradient other than 1 cannot be undone there: it turns the gradient of
    the hidden states into NaN. None: by autograd, summed in fp32.
    filter_below: leave out of the gradients, per chunk, blocks of columns in which both models' probabilities are
    below it and no label lies. What is left out of one token's gradient into the logits has an L1 norm of at most
    |weight| * (kd_scale / T * (p' + q') + ce_scale * q'), with p' and q' the mass of the columns left out (at most
    filter_below times their number), whatever the divergence; reverse KL and top_k have no such bound and are refused.
    It costs one synchronization with the host per chunk. None: nothing is left out.

    Memory beyond the gradients: a buffer of (chunk, vocab / tp) fp32 per model, and numbers per token. Collectives: see
    the module. Without grad mode, or where nothing needs a gradient, none is computed.
    Raises ValueError where shapes or settings do not fit.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, token_weights, shard, sequence_parallel)
    check(teacher_hidden is not None, labels, temperature, top_k, telemetry, shard)
    if filter_below is not None and (divergence.name == "reverse_kl" or top_k is not None):
        raise ValueError("filter_below: expected a divergence with a bound on its slope, found reverse_kl or top_k.")
    settings = _Settings(
        kd_scale if teacher_hidden is not None else 0.0,
        ce_scale if labels is not None else 0.0,
        temperature if teacher_hidden is not None else 1.0,
        divergence,
        shard,
        top_k,
        teacher_share,
        chunk_tokens,
        sequence_parallel,
        head_gradient,
        filter_below,
        telemetry,
        kernels or kernels_for(student_hidden.device)[0],
        torch.is_grad_enabled(),
    )
    teacher = (
        None if teacher_hidden is None or teacher_head is None else (teacher_hidden.detach(), teacher_head.detach())
    )
    return LinearTerms(
        *_LinearDivergence.apply(student_hidden, student_head, teacher, labels, token_weights.detach(), settings)
    )


def _check(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor,
    shard: Shard,
    sequence_parallel: bool,
) -> None:
    tokens = student_hidden.shape[0] * (shard.world if sequence_parallel else 1)
    for name, found in (("labels", labels), ("token_weights", token_weights)):
        if found is not None and found.shape != (tokens,):
            raise ValueError(f"{name}: expected one for each of {tokens} tokens, found shape {tuple(found.shape)}.")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher: expected hidden states and a head, found one of them.")
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden is None or head is None:
            continue
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
            raise ValueError(
                f"{name}: expected hidden states (tokens, hidden) and a head (vocabulary, hidden) of one dtype, found "
                f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(head.shape)} {head.dtype}."
            )
        if hidden.shape[0] != student_hidden.shape[0]:
            raise ValueError(
                f"{name}: expected the student's {student_hidden.shape[0]} tokens, found {hidden.shape[0]}."
            )
        if shard.valid_width(head.shape[0]) != shard.valid_width(student_head.shape[0]):
            raise ValueError(
                f"{name}: expected a head of the student's {student_head.shape[0]} rows, found {head.shape[0]}. Where "
                "only the padding of the vocabulary differs, align_columns of the transposed head helps."
            )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        labels: Tensor | None,
        weights: Tensor,
        settings: _Settings,
    ) -> tuple[Any, ...]:
        wanted = settings.with_gradient and bool(settings.kd_scale or settings.ce_scale)
        for_hidden, for_head = (wanted and needed for needed in ctx.needs_input_grad[:2])
        for_head = for_head or (wanted and settings.head_gradient is not None)
        work = _Chunks(hidden, head, teacher, labels, weights, settings, for_hidden, for_head)
        work.run()
        ctx.scaled_in_place = settings.head_gradient is None
        ctx.head_dtype = head.dtype
        own = work.head_gradient if ctx.needs_input_grad[1] and ctx.scaled_in_place else None
        ctx.save_for_backward(work.hidden_gradient, own)
        ctx.mark_non_differentiable(*(term for term in work.terms if term is not None))
        token_loss, kd, ce, agreement = work.terms
        assert token_loss is not None
        loss = torch.where(weights != 0, weights * token_loss, 0.0).sum()
        return loss, token_loss, kd, ce, agreement, work.telemetry

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, head = ctx.saved_tensors
        if not ctx.scaled_in_place:
            upstream = torch.where(upstream == 1, upstream, torch.nan)
        # In place: autograd's version counter turns a second backward through the same graph into an error.
        for gradient in (hidden, head):
            if gradient is not None:
                gradient.mul_(upstream)
        return hidden, None if head is None else head.to(ctx.head_dtype), None, None, None, None


class _Chunks:
    """One pass over the tokens: fills terms and gradients."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        labels: Tensor | None,
        weights: Tensor,
        settings: _Settings,
        for_hidden: bool,
        for_head: bool,
    ) -> None:
        shard = self.shard = settings.shard
        self.settings, self.labels, self.weights = settings, labels, weights
        width = shard.valid_width(head.shape[0])
        # Padded rows of the heads take no part, so that their gradient stays 0.
        self.head = head.detach()[:width]
        self.teacher_head = None if teacher is None else teacher[1][:width]
        parts = self.parts = shard.world if settings.sequence_parallel else 1
        own = hidden.shape[0]  # tokens on this rank
        step = max(1, (settings.chunk_tokens or _chunk_tokens(width, hidden.device)) // parts)
        self.bounds = [slice(first, min(first + step, own)) for first in range(0, own, step)]
        group = shard.group if settings.sequence_parallel and shard.world > 1 else None
        self.students = Rows(hidden.detach(), self.bounds, group)
        self.teachers = None if teacher is None else Rows(teacher[0], self.bounds, group)
        chunk = min(step, own) * parts
        self.buffers = [torch.empty(chunk, width, device=hidden.device) for _ in range(1 if teacher is None else 2)]
        self.gradient_buffer = None  # None: over the student's logits
        if head.is_cuda and head.dtype != torch.float32 and (for_hidden or for_head):
            self.gradient_buffer = torch.empty(chunk, width, dtype=head.dtype, device=head.device)
        self.hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        self.head_gradient = None
        if for_head:
            self.head_gradient = settings.head_gradient
            if self.head_gradient is None:
                self.head_gradient = torch.zeros(head.shape, device=head.device)
        tokens = own * parts
        self.terms: list[Tensor | None] = [
            torch.empty(tokens, device=hidden.device) if present else None
            for present in (True, teacher is not None, labels is not None, teacher is not None)
        ]
        self.telemetry = None
        if settings.telemetry:
            self.telemetry = Telemetry(*(torch.empty(tokens, device=hidden.device) for _ in Telemetry._fields))

    def run(self) -> None:
        out = None
        if self.hidden_gradient is not None:
            out = Gradients(self.hidden_gradient, self.bounds, self.shard, self.settings.sequence_parallel)
        for index in range(len(self.bounds)):
            self._chunk(index, out)
        if out is not None:
            out.finish()

    def _chunk(self, index: int, out: Gradients | None) -> None:
        settings = self.settings
        labels = None if self.labels is None else self._of_chunk(self.labels, index).reshape(-1)
        hidden = self.students.take(index)
        teacher = None if self.teachers is None else self.teachers.take(index)
        student_logits = products.logits(hidden, self.head, self.buffers[0][: hidden.shape[0]])
        teacher_logits = teacher_greatest = None
        if teacher is not None and self.teacher_head is not None:
            teacher_logits = products.logits(teacher, self.teacher_head, self.buffers[1][: hidden.shape[0]])
            if settings.teacher_share is not None:
                teacher_greatest = greatest(teacher_logits, self.shard, settings.kernels)
                # t * teacher + (1 - t) * student, over the teacher's logits.
                torch.lerp(student_logits, teacher_logits, settings.teacher_share, out=teacher_logits)
        chunk = make_chunk(
            student_logits,
            teacher_logits,
            labels,
            self.shard,
            settings.temperature,
            settings.divergence,
            settings.top_k,
            settings.telemetry,
        )
        measured, normal = measure(chunk, labels, self.shard, settings.kernels)
        if teacher_greatest is not None:
            measured = measured._replace(agreement=(measured.greatest == teacher_greatest).float())
        loss, kd_factor, ce_factor = weighted(
            measured, labels, settings.kd_scale, settings.ce_scale, settings.temperature
        )
        found = (loss, measured.kd, measured.ce, measured.agreement, *(measured.telemetry or ()))
        for whole, part in zip((*self.terms, *(self.telemetry or ())), found, strict=True):
            if whole is not None and part is not None:
                self._of_chunk(whole, index).copy_(part.view(self.parts, -1))
        if out is None and self.head_gradient is None:
            return
        weights = self._of_chunk(self.weights, index).reshape(-1)
        kd_factor, ce_factor = (None if factor is None else factor * weights for factor in (kd_factor, ce_factor))
        self._gradients(index, chunk, normal, labels, kd_factor, ce_factor, hidden, out)

    def _gradients(
        self,
        index: int,
        chunk: Chunk,
        normal: Normalizers,
        labels: Tensor | None,
        kd_factor: Tensor | None,
        ce_factor: Tensor | None,
        hidden: Tensor,
        out: Gradients | None,
    ) -> None:
        """The gradient over the student's logits, and from there into the hidden states and the head."""
        gradient = chunk.student if self.gradient_buffer is None else self.gradient_buffer[: hidden.shape[0]]
        live = [slice(0, chunk.student.shape[1])]
        if self.settings.filter_below is not None:
            live = live_columns(chunk, normal, labels, self.shard, self.settings.filter_below)
        for columns in live:
            part = (
                chunk if columns == slice(0, chunk.student.shape[1]) else columns_of(chunk, columns, labels, self.shard)
            )
            self.settings.kernels.gradient(part, normal, kd_factor, ce_factor, gradient[:, columns])
        if out is not None:
            out.add(index, products.hidden_gradient(gradient, self.head, live))
        if self.head_gradient is not None:
            for columns in live:
                products.add_head_gradient(self.head_gradient[columns], gradient[:, columns], hidden)

    def _of_chunk(self, values: Tensor, index: int) -> Tensor:
        """values: (tokens,) of all ranks -> a view (parts, tokens of the chunk per part)."""
        return values.view(self.parts, -1)[:, self.bounds[index]]


def _chunk_tokens(width: int, device: torch.device) -> int:
    """How many tokens a buffer holds; whole tiles of matrix products where there are that many."""
    tokens = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (4 * max(1, width)))
    tokens = min(tokens, CHUNK_TOKENS.get(device.type, tokens))
    return tokens // 32 * 32 or tokens

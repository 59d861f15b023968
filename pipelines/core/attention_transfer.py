"""Losses between the attention of two causal models whose heads are cut over a tensor-parallel group.

For a query token i and the tokens j it sees (j <= i, in i's own document), head h of a model has scores
S_h(i, j) = q_i . k_j / sqrt(head_dim) and probabilities P_h(i, .) = softmax of S_h(i, .). The loss of token i is

    kind      heads="mean" (any number of heads)              heads="each" (as many in both, head h against head h)
    "kl"      KL(A_teacher || A_student), A = mean over h P_h     mean over h of KL(P_teacher_h || P_student_h)
    "mse"     sum over j of (A_student - A_teacher)^2             mean over h of sum over j of (P_s - P_t)^2
    "scores"  mean over j of (B_student - B_teacher)^2,           mean over h and j of (S_s - S_t)^2
              B = mean over h S_h

("scores" is the attention loss of arXiv 1909.10351, equation 7, which compares scores before the softmax; KL of
distributions: arXiv 2002.10957, section 3.1.) With c the gradient of the loss with respect to a head's probabilities,
that with respect to its scores is P * (c - sum over j of P * c).

Rows of queries are taken in blocks, each against the keys up to its end: no more than (batch, heads / tp, rows, keys)
exists at a time, and gradients are computed in the forward pass.
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipelines.core.features import gradients_needed, with_gradients

KINDS = ("kl", "mse", "scores")
HEADS = ("mean", "each")
_TINY = torch.finfo(torch.float32).tiny

QueryAndKey = tuple[Tensor, Tensor]


def attention_loss(
    student: QueryAndKey,
    teacher: QueryAndKey,
    weights: Tensor,
    *,
    kind: str,
    heads: str = "mean",
    group: ProcessGroup | None = None,
    documents: Tensor | None = None,
    block_rows: int = 128,
) -> Tensor:
    """The sum over query tokens of weight * the token's loss, a scalar fp32 that is replicated over `group`.

    student, teacher: (query, key) after rotary embedding, query (sequence, batch, heads / tp, head_dim), key (sequence,
    batch, KV groups / tp, head_dim), of whole sequences on every rank (under sequence parallelism too: attention has
    gathered them). The models may differ in head_dim and KV groups, and in heads unless heads="each". weights:
    (sequence, batch), 0 where a query does not count. documents: (sequence, batch) numbers of packed documents.

    group: the ranks that hold the heads, as many of each model on every rank. Each rank returns the whole loss and the
    gradient of its own heads: there is nothing to reduce afterwards.

    Collectives over group, forward: with heads="mean" one all-reduce of (2, batch, rows, keys) fp32 per block, with
    heads="each" one of a single number; backward: none. A mean probability of the student below fp32's smallest normal
    number counts as that number and has no gradient. Arithmetic is fp32. Raises ValueError for unknown names and for
    numbers of heads that heads="each" cannot pair.
    """
    if kind not in KINDS or heads not in HEADS:
        raise ValueError(
            f"attention loss: expected kind {', '.join(KINDS)} and heads {', '.join(HEADS)}, found {kind}, {heads}."
        )
    own_heads, teacher_heads = student[0].shape[2], teacher[0].shape[2]
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if heads == "each" and own_heads != teacher_heads:
        raise ValueError(
            f"attention loss: expected as many heads in both models, found {own_heads * ranks} and "
            f"{teacher_heads * ranks}. Compare their means with heads=mean."
        )
    counted = (weights != 0)[:, :, None, None]
    query, target_query = (torch.where(counted, pair[0].detach().float(), 0.0) for pair in (student, teacher))
    key, target_key = student[1].detach().float(), teacher[1].detach().float()
    total_heads = own_heads * ranks
    needed = gradients_needed(student)
    gradients = (torch.zeros_like(query), torch.zeros_like(key)) if needed else None
    total = torch.zeros((), dtype=torch.float64, device=query.device)
    for start in range(0, query.shape[0], block_rows):
        rows = slice(start, min(start + block_rows, query.shape[0]))
        visible = _visible(rows, weights.shape[1], documents, query.device)
        own = _maps(query, key, rows, visible, kind)
        target = _maps(target_query, target_key, rows, visible, kind)
        compared = own
        if heads == "mean":
            means = torch.stack([own.sum(dim=1) / total_heads, target.sum(dim=1) / (teacher_heads * ranks)])
            _add_over_ranks(means, group)
            compared, target = means.unsqueeze(2).unbind()
        value, pull = _loss_and_gradient(compared, target, visible, kind)
        weight = weights[rows].t().unsqueeze(1).float()  # (batch, 1, rows), of values (batch, heads or 1, rows)
        total += (value * weight).sum(dtype=torch.float64)
        if gradients is None:
            continue
        pull = pull * (weight / total_heads).unsqueeze(-1)
        if kind != "scores":
            pull = own * (pull - (own * pull).sum(dim=-1, keepdim=True))
        _add_gradients(pull.expand_as(own), query, key, rows, gradients)
    if heads == "each":
        total = total / total_heads
        _add_over_ranks(total, group)
    total = total.float()
    return total if gradients is None else with_gradients(total, student, gradients)


def _visible(rows: slice, batch: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """(batch, 1, rows, keys up to the last row) bool: which keys each query sees."""
    places = torch.arange(rows.stop, device=device)
    visible = (places[rows, None] >= places[None, :]).expand(batch, -1, -1)
    if documents is not None:
        labels = documents[: rows.stop].t()
        visible = visible & (labels[:, rows, None] == labels[:, None, :])
    return visible.unsqueeze(1)


def _scores(query: Tensor, key: Tensor, rows: slice) -> Tensor:
    """(batch, heads, rows, keys up to the last row): q . k / sqrt(head_dim), each KV group's key for its heads."""
    _, groups, head_dim = key.shape[1:]
    queries = query[rows].unflatten(2, (groups, -1)) / math.sqrt(head_dim)
    return torch.einsum("ibgnd,jbgd->bgnij", queries, key[: rows.stop]).flatten(1, 2)


def _maps(query: Tensor, key: Tensor, rows: slice, visible: Tensor, kind: str) -> Tensor:
    """(batch, heads, rows, keys): probabilities, or for "scores" the scores; 0 where a query does not see."""
    scores = _scores(query, key, rows)
    if kind == "scores":
        return scores.masked_fill_(~visible, 0.0)
    return scores.masked_fill_(~visible, -math.inf).softmax(dim=-1)


def _loss_and_gradient(own: Tensor, target: Tensor, visible: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """own, target: (batch, heads or 1, rows, keys) -> values (batch, heads or 1, rows) and d value / d own."""
    if kind == "kl":
        floored = own.clamp(min=_TINY)
        value = (target * (target.clamp(min=_TINY).log() - floored.log())).sum(dim=-1)
        return value, torch.where(own > _TINY, -target / floored, 0.0)
    difference = own - target
    if kind == "mse":
        return difference.square().sum(dim=-1), difference.mul_(2)
    seen = visible.sum(dim=-1)
    return difference.square().sum(dim=-1) / seen, difference.mul_(2) / seen.unsqueeze(-1)


def _add_gradients(pull: Tensor, query: Tensor, key: Tensor, rows: slice, gradients: QueryAndKey) -> None:
    """pull: (batch, heads, rows, keys) d loss / d scores; adds what follows for queries of `rows` and keys."""
    groups, scale = key.shape[2], 1 / math.sqrt(key.shape[3])
    pull = pull.unflatten(1, (groups, -1)) * scale
    gradients[0][rows] = torch.einsum("bgnij,jbgd->ibgnd", pull, key[: rows.stop]).flatten(2, 3)
    gradients[1][: rows.stop] += torch.einsum("bgnij,ibgnd->jbgd", pull, query[rows].unflatten(2, (groups, -1)))


def _add_over_ranks(values: Tensor, group: ProcessGroup | None) -> None:
    if group is not None and torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(values, group=group)

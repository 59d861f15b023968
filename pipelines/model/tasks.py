"""How likely a sharded model holds continuations of contexts: what multiple-choice questions are scored by."""

from collections.abc import Callable, Sequence
from math import lcm

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pipelines.config import UserError
from pipelines.core.divergence import token_terms
from pipelines.core.vocab_parallel import IGNORED_LABEL, Shard
from pipelines.model.forward import Batch, evaluating
from pipelines.model.quality import forward_logits, reduced
from pipelines.questions import Row


def log_likelihoods(
    model: GPTModel,
    rows: Sequence[Row],
    *,
    vocab_size: int,
    tokens_per_pass: int,
    advance: Callable[[int], None] | None = None,
) -> list[float]:
    """The sum of log p(id | all before it) over each row's continuation, nats, the same on every rank.

    model: this rank's pipeline stage. rows: all of them on every rank; the data-parallel ranks share them. A pass holds
    rows of similar lengths, filled up at the right, of at most tokens_per_pass ids in all, or one row.
    advance: called after each pass with the rows that it held, those of other data-parallel ranks included.

    Collectives, besides those of the forward passes: one all-gather per pass over the tensor-parallel group
    (`core.divergence`); at the end one all-reduce of (rows,) float64 over the data-parallel group and one broadcast
    over the pipeline. Raises UserError on every rank where one is NaN or infinite.
    """
    assert parallel_state.get_context_parallel_world_size() == 1, "tasks are read in whole rows"
    device = next(model.parameters()).device
    found = torch.zeros(len(rows), dtype=torch.float64, device=device)
    passes = _passes(rows, tokens_per_pass)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    with evaluating([model]):
        for first in range(0, len(passes), ranks):
            together = passes[first : first + ranks]
            if rank < len(together):
                places = together[rank]
                batch = _batch([rows[place] for place in places], model.config.tensor_model_parallel_size, device)
                sums = _sums(forward_logits(model, batch), batch, vocab_size)
                if sums is not None:
                    found[places] = sums
            if advance:
                advance(sum(len(places) for places in together))
    found = reduced(found)
    if not bool(found.isfinite().all()):
        raise UserError(
            "prune.task: expected finite log-likelihoods, found NaN or infinity. Check the model's weights; with bf16 "
            "weights try fp32."
        )
    return found.tolist()


def _passes(rows: Sequence[Row], tokens: int) -> list[list[int]]:
    """Places of rows for each forward pass, the longest rows first: what does not fit into memory fails at once."""
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].ids), place))
    passes: list[list[int]] = []
    for place in order:
        fits = passes and (len(passes[-1]) + 1) * (len(rows[passes[-1][0]].ids) - 1) <= tokens
        if fits:
            passes[-1].append(place)
        else:
            passes.append([place])
    return passes


def _batch(rows: Sequence[Row], tensor_size: int, device: torch.device) -> Batch:
    """tokens, labels, position_ids: (rows, length) int64; labels are -100 but for the continuations.

    The length is a multiple of 8 and of the tensor-parallel size: sequence parallelism cuts it.
    """
    step = lcm(8, tensor_size)
    length = -(-max(len(row.ids) - 1 for row in rows) // step) * step
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for number, row in enumerate(rows):
        ids, read = torch.tensor(row.ids), len(row.ids) - 1
        tokens[number, :read] = ids[:-1]
        labels[number, read - row.continuation : read] = ids[read + 1 - row.continuation :]
    batch = {"tokens": tokens, "labels": labels, "position_ids": torch.arange(length).expand_as(tokens)}
    return {name: value.to(device) for name, value in batch.items()}


def _sums(logits: Tensor | None, batch: Batch, vocab_size: int) -> Tensor | None:
    """(rows,) float64 log-likelihoods of the continuations; None on pipeline stages without logits."""
    if logits is None:
        return None
    labels = batch["labels"]
    shard = Shard.uniform(logits.shape[-1], vocab_size, parallel_state.get_tensor_model_parallel_group())
    flat = logits.flatten(0, 1)
    terms = token_terms(
        flat, None, labels.flatten(), kd_scale=0.0, ce_scale=0.0, temperature=1.0, shard=shard, telemetry=False
    )
    assert terms.ce is not None
    return -terms.ce.double().view_as(labels).sum(1)

"""Importance of hidden channels, ffn neurons, attention heads, KV groups and layers, from forward passes.

Width (arXiv 2407.14679, section 2.2; aggregation of arXiv 2408.11796): a channel's activation a[t, c] is aggregated
over one sample's tokens, then over the samples, each by one of

    mean  the mean of the absolute values     l1   their sum
    l2    the root of the sum of squares      max  the greatest

of which "mean" over the sequence and "l2" over the samples are the default. What is made of several channels, whatever
the aggregation: a head's and a KV group's score is the L2 norm over all their channels' scores (the channels of the
output projection's input; a group's are those of all its heads); a hidden channel's is the sum over the outputs of both
norms of every layer.

Depth: block influence (arXiv 2403.03853, equation 1), 1 - the mean over tokens of cos(layer input, layer output).

With the defaults these are the formulas of ModelOpt 0.37's `mcore_minitron`, with these differences: tokens that the
mask leaves out count nowhere (ModelOpt knows no mask); block influence is a mean over all tokens (ModelOpt's is the sum
of the means of the batches: a factor, the same ranking); sums over samples are float64 (float32 there). ModelOpt's
score of a KV group takes the channels of other heads than the group's own, and is not matched. arXiv 2407.14679 takes a
head's norm over head_dim per token, before the aggregation.

The accumulators hold one number per channel (or two per layer), whatever the number of samples.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipelines.choices import Aggregation

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements at a time: on a CPU what its caches hold


@dataclass(frozen=True)
class Counted:
    """Which tokens of a batch count.

    tokens: (batch,) of each whole sample, float32. mask: (sequence, batch) bool of the tokens at hand, False where one
    is left out; None where every one counts.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None = None


class ActivationNorm:
    """Scores of channels, sample by sample: see the module.

    total: (channels,) float64: over samples the sum (mean, l1), the sum of squares (l2) or the greatest (max). A sample
    whose tokens are all masked adds nothing.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        *,
        sequence: Aggregation = Aggregation.mean,
        samples: Aggregation = Aggregation.l2,
    ) -> None:
        self.sequence, self.samples = sequence, samples
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self,
        activations: torch.Tensor,
        counted: Counted,
        *,
        token_scale: torch.Tensor | None = None,
        channel_scale: torch.Tensor | None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Add the samples of one batch: of activations * token_scale * channel_scale.

        activations: (sequence, batch, channels), any floating dtype; sums over the sequence are float32.
        token_scale: (sequence, batch) float32, not negative; channel_scale: (channels,). None: 1.
        sequence_group: the ranks among which the sequence is split (sequence parallelism): one all-reduce of
            (batch, channels) float32 over it, a MAX with the aggregation max and else a SUM, after which `total` is the
            same on all its ranks.
        """
        found = over_sequence(activations, self.sequence, counted.mask, token_scale)
        greatest = self.sequence is Aggregation.max
        if sequence_group is not None:
            if greatest:  # of which no NaN would come out
                found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)
            dist.all_reduce(found, op=dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM, group=sequence_group)
        if self.sequence is Aggregation.mean:
            found = found / counted.tokens.clamp(min=1).unsqueeze(-1)
        elif self.sequence is Aggregation.l2:
            found = found.sqrt()
        if channel_scale is not None:
            found = found * channel_scale.float().abs()
        self.add(found)

    def add(self, found: torch.Tensor) -> None:
        """found: (batch, channels), one sample's aggregate per row."""
        add_samples(self.total, found, self.samples)


def over_sequence(
    activations: torch.Tensor,
    aggregation: Aggregation,
    mask: torch.Tensor | None = None,
    token_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """(batch, channels) float32 over the tokens at hand: the sum of |a| (mean, l1), of a^2 (l2), or the greatest |a|.

    Arguments as of ActivationNorm.update. Reads the activations once; the memory is that of a chunk.
    """
    batch, channels = activations.shape[1:]
    rows = max(1, _CHUNK[activations.device.type] // max(batch * channels, 1))
    found = torch.zeros(batch, channels, dtype=torch.float32, device=activations.device)
    for start in range(0, len(activations), rows):
        part = slice(start, start + rows)
        values = activations[part].float()
        values = values.square() if aggregation is Aggregation.l2 else values.abs()
        if mask is not None:  # what is left out may be NaN: its weight of 0 would not do
            values.masked_fill_(~mask[part].unsqueeze(-1), 0)
        scale = None if token_scale is None else token_scale[part]
        if aggregation is Aggregation.max:
            values = values if scale is None else values.mul_(scale.unsqueeze(-1))
            found = torch.maximum(found, values.amax(0))
        elif scale is None:
            found += values.sum(0)
        else:
            scale = scale.square() if aggregation is Aggregation.l2 else scale
            if mask is not None:
                scale = scale.masked_fill(~mask[part], 0)
            found += torch.bmm(scale.t().unsqueeze(1), values.transpose(0, 1)).squeeze(1)
    return found


def add_samples(total: torch.Tensor, found: torch.Tensor, aggregation: Aggregation) -> None:
    """Add to total: (units,) float64 one sample's score per row of found: (samples, units), not negative."""
    found = found.double()
    if aggregation is Aggregation.max:
        torch.maximum(total, found.amax(0), out=total)
    else:
        total += (found.square() if aggregation is Aggregation.l2 else found).sum(0)


def over_samples(total: torch.Tensor, samples: int, aggregation: Aggregation) -> torch.Tensor:
    """The scores, from what `add_samples` has added up over all samples."""
    if aggregation is Aggregation.l2:
        return total.sqrt()
    return total / max(samples, 1) if aggregation is Aggregation.mean else total


class BlockInfluence:
    """Of one layer: the sum over tokens of 1 - cos(input, output), and the number of tokens.

    sums: (2,) float64: [sum of distances, tokens]. Where the sequence is split among ranks, each holds its own part.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor | None) -> None:
        """inputs, outputs: (sequence, batch, hidden), compared in float32; mask: (sequence, batch) bool, None: all."""
        rows = max(1, _CHUNK[inputs.device.type] // max(inputs[0].numel(), 1))
        for start in range(0, len(inputs), rows):
            part = slice(start, start + rows)
            x, y = inputs[part].float(), outputs[part].float()
            norms = token_norms(x).clamp_min(1e-8) * token_norms(y).clamp_min(1e-8)
            distance = 1 - torch.linalg.vecdot(x, y) / norms
            if mask is not None:
                distance = distance.masked_fill(~mask[part], 0)
            self.sums[0] += distance.sum(dtype=torch.float64)
        self.sums[1] += inputs.shape[0] * inputs.shape[1] if mask is None else mask.sum()


def token_norms(x: torch.Tensor) -> torch.Tensor:
    """x: (..., channels). Returns (...,) float32: each token's L2 norm."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class Scores:
    """Importance of everything that can be pruned; higher is more important. All float64, on the CPU.

    hidden: (hidden,); ffn: (layers, neurons); heads: (layers, heads), as Hugging Face numbers them; kv_groups:
    (layers, groups); block_influence: (layers,); taylor_layers: (layers,), see model/taylor.py, None where not
    measured; layers: (layers,), what layers are ranked by, None for the block influence.
    """

    hidden: torch.Tensor
    ffn: torch.Tensor
    heads: torch.Tensor
    kv_groups: torch.Tensor
    block_influence: torch.Tensor
    samples: int
    tokens: int
    taylor_layers: torch.Tensor | None = None
    layers: torch.Tensor | None = None


def hidden_scores(scores: torch.Tensor) -> torch.Tensor:
    """scores: (norms, hidden), of the outputs of both norms of every layer. Returns (hidden,): their sum."""
    return scores.sum(0)


def unit_scores(scores: torch.Tensor, channels: int) -> torch.Tensor:
    """scores: (..., units * channels) of the output projection's input.

    Returns (..., units): the L2 norm over the scores of each unit's channels, of which a head has head_dim and a KV
    group as many as all its heads together.
    """
    return scores.unflatten(-1, (-1, channels)).norm(dim=-1)


def first_non_finite(values: torch.Tensor) -> int | None:
    """The lowest index along dim 0 with a NaN or an infinity in it; None where all is finite."""
    bad = ~values.flatten(1).isfinite().all(dim=1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None

"""Importance of hidden channels, ffn neurons, attention heads and layers, from the activations of forward passes.

Width (arXiv 2407.14679, section 2.2; aggregation of arXiv 2408.11796): a channel's activation is aggregated over one
sample's sequence by the mean of its absolute value and over the samples by the L2 norm,

    score[c] = sqrt( sum over samples ( mean over the sample's tokens |activation[t, c]| )^2 )

Depth: block influence (arXiv 2403.03853, equation 1), 1 - the mean over tokens of cos(layer input, layer output).

These are the formulas of ModelOpt 0.37's `mcore_minitron`, with these differences: tokens that the mask leaves out
count nowhere (ModelOpt knows no mask); block influence is a mean over all tokens (ModelOpt's is the sum of the means of
the batches: a factor, the same ranking); sums over samples are float64 (float32 there). A head's score is the L2 norm
over head_dim of its channels' scores, as in ModelOpt; arXiv 2407.14679 takes the norm over head_dim per token, before
the aggregation.

The accumulators hold one number per channel (or two per layer), whatever the number of samples.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F


class ActivationNorm:
    """Per channel, the sum over samples of (mean over the sample's tokens |activation|)^2.

    squares: (channels,) float64. A sample whose tokens are all masked adds nothing.
    """

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self, activations: torch.Tensor, mask: torch.Tensor, sequence_group: dist.ProcessGroup | None = None
    ) -> None:
        """Add the samples of one batch.

        activations: (sequence, batch, channels), any floating dtype; sums over the sequence are float32.
        mask: (sequence, batch) bool, False where a token is left out.
        sequence_group: the ranks among which the sequence is split (sequence parallelism): one all-reduce of
            (batch, channels + 1) float32 over it, after which `squares` is the same on all its ranks.
        """
        kept = activations.masked_fill(~mask.unsqueeze(-1), 0).abs_()
        sums = torch.cat([kept.sum(0, dtype=torch.float32), mask.sum(0, dtype=torch.float32).unsqueeze(-1)], dim=-1)
        if sequence_group is not None:
            dist.all_reduce(sums, group=sequence_group)
        means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        self.squares += means.double().square().sum(0)


class BlockInfluence:
    """Of one layer: the sum over tokens of 1 - cos(input, output), and the number of tokens.

    sums: (2,) float64: [sum of distances, tokens]. Where the sequence is split among ranks, each holds its own part.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor) -> None:
        """inputs, outputs: (sequence, batch, hidden), compared in float32; mask: (sequence, batch) bool."""
        distance = 1 - F.cosine_similarity(inputs.float(), outputs.float(), dim=-1)
        self.sums[0] += distance.masked_fill(~mask, 0).sum(dtype=torch.float64)
        self.sums[1] += mask.sum()


@dataclass(frozen=True)
class Scores:
    """Importance of everything that can be pruned; higher is more important. All float64, on the CPU.

    hidden: (hidden,); ffn: (layers, neurons); heads: (layers, heads); block_influence: (layers,).
    """

    hidden: torch.Tensor
    ffn: torch.Tensor
    heads: torch.Tensor
    block_influence: torch.Tensor
    samples: int
    tokens: int


def hidden_scores(squares: torch.Tensor) -> torch.Tensor:
    """squares: (norms, hidden), outputs of both norms of every layer. Returns (hidden,): the norms' scores added."""
    return squares.sqrt().sum(0)


def head_scores(squares: torch.Tensor, head_dim: int) -> torch.Tensor:
    """squares: (..., heads * head_dim) of the output projection's input.

    Returns (..., heads): the L2 norm over head_dim of the channels' scores.
    """
    return squares.unflatten(-1, (-1, head_dim)).sum(-1).sqrt()


def first_non_finite(values: torch.Tensor) -> int | None:
    """The lowest index along dim 0 with a NaN or an infinity in it; None where all is finite."""
    bad = ~values.flatten(1).isfinite().all(dim=1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None

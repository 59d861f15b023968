"""Sums of figures over groups of tokens, and how far a mean over documents would move with other documents.

A figure of a corpus is a ratio of sums over documents, sum_d a_d / sum_d b_d: the loss per token, the loss per byte.
Tokens of one document resemble each other, so documents and not tokens are drawn: a resample takes D of the D documents
at random, with repetition, and computes the ratio anew; the interval is between percentiles of many such ratios (Efron,
"Bootstrap Methods", Annals of Statistics 7, 1979; for corpora: Koehn, EMNLP 2004). A difference of two models is taken
on the same resamples, since both are measured on the same documents: what is hard for both cancels.
"""

import torch
from torch import Tensor

RESAMPLES = 1000
SEED = 20_260  # of the resamples: the same documents give the same interval on every machine and at every layout
LOW, HIGH = 0.025, 0.975  # percentiles: 95 % of the resamples lie between
MOST_UNITS = 1 << 14  # more documents than that are drawn in groups: as wide an interval in a fraction of the time
CELLS = 1 << 22  # counts that are held at a time


def add_by_group(sums: Tensor, group: Tensor, values: Tensor) -> None:
    """Add each token's values to its group's row, in the order of the tokens: the same from run to run.

    sums: (groups, figures) float64 on the CPU, changed in place; group: (tokens,) int64; values: (tokens, figures).
    """
    assert not sums.is_cuda, "on a GPU the order of the additions changes from run to run"
    sums.index_add_(0, group, values.to(sums.dtype))


def resampled(sums: Tensor, resamples: int = RESAMPLES, seed: int = SEED) -> Tensor:
    """Sums over documents drawn at random, with repetition, as many as there are.

    sums: (documents, figures), one document or more. Returns (resamples, figures) float64 on the CPU. The draws depend
    on seed, number of documents and resamples alone; figures of one call share them. Of more than MOST_UNITS documents
    every MOST_UNITS-th belong together and are drawn as one. No collectives.
    """
    sums = sums.double().cpu()
    if len(sums) > MOST_UNITS:
        units = torch.zeros(MOST_UNITS, sums.shape[1], dtype=torch.float64)
        add_by_group(units, torch.arange(len(sums)) % MOST_UNITS, sums)
        sums = units
    documents = len(sums)
    generator = torch.Generator().manual_seed(seed)
    found, step = [], max(1, CELLS // documents)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = torch.randint(documents, (rows, documents), generator=generator)
        places = (drawn + documents * torch.arange(rows)[:, None]).flatten()
        counts = torch.bincount(places, minlength=rows * documents).view(rows, documents)
        found.append(counts.double() @ sums)
    return torch.cat(found)


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of (resamples,) figures: percentiles of the finite ones, linear between two. One must be."""
    kept = values[values.isfinite()]
    low, high = torch.quantile(kept, torch.tensor([LOW, HIGH], dtype=kept.dtype)).tolist()
    return low, high

"""What a validation tells beyond means over tokens: the divergence by the teacher's entropy, and calibration.

    kd in band b        sum of kd over the tokens whose teacher entropy lies in b / number of those tokens
    calibration error   sum over bins of |sum of (correct - confidence) over the bin's tokens| / number of all tokens

the second being the expected calibration error (arXiv 1706.04599, equation 3). Neither is a mean of the micro batches'
figures: what is added up, over micro batches, ranks and batches alike, are the sums of `sums`; the two functions after
it divide at the very end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.core.divergence import Telemetry

# Of the teacher's distribution, in nats: below 1 it knows what comes, from 4 up some fifty tokens are as likely. Fixed,
# and not shares of log V, so that runs with other vocabularies can be laid side by side.
ENTROPY_BOUNDS = (1.0, 2.0, 4.0)
ENTROPY_BANDS = ("0_1", "1_2", "2_4", "4_up")  # the lower bound belongs to a band, the upper to the next
CALIBRATION_BINS = 15  # of equal width; the upper bound belongs to a bin, the lower to the one before

SIZE = 2 * len(ENTROPY_BANDS) + 2 * CALIBRATION_BINS


def sums(seen: Telemetry, kd: Tensor, valid: Tensor) -> Tensor:
    """(SIZE,) fp64 sums over valid tokens: per band of kd and of ones, per bin of (correct - confidence) of the student
    and of the teacher.

    seen, kd, valid: of one shape; what is not valid may be anything. No collectives, no synchronization with the host.
    """
    seen, valid = Telemetry(*(values.flatten().double() for values in seen)), valid.flatten()
    band = entropy_band(seen.teacher_entropy)
    rows = [_by_group(values, band, len(ENTROPY_BANDS), valid) for values in (kd.flatten().double(), valid.double())]
    for confidence, correct in (
        (seen.student_confidence, seen.student_correct),
        (seen.teacher_confidence, seen.teacher_correct),
    ):
        rows.append(_by_group(correct - confidence, calibration_bin(confidence), CALIBRATION_BINS, valid))
    return torch.cat(rows)


def entropy_band(entropy: Tensor) -> Tensor:
    """The place in ENTROPY_BANDS of each entropy, int64. entropy: nats, fp64."""
    bounds = torch.tensor(ENTROPY_BOUNDS, dtype=entropy.dtype, device=entropy.device)
    return torch.bucketize(entropy, bounds, right=True)


def calibration_bin(confidence: Tensor) -> Tensor:
    """The bin of each confidence, int64 from 0. confidence: fp64."""
    return ((confidence * CALIBRATION_BINS).ceil().long() - 1).clamp(0, CALIBRATION_BINS - 1)


def _by_group(values: Tensor, group: Tensor, groups: int, valid: Tensor) -> Tensor:
    """(groups,): the sum of the valid values of each group, in an order that does not change from run to run."""
    chosen = (group[:, None] == torch.arange(groups, device=group.device)) & valid[:, None]
    return torch.where(chosen, values[:, None], 0.0).sum(0)


def by_entropy(totals: Sequence[float]) -> dict[str, float]:
    """The mean divergence of each band that has tokens, by its name in ENTROPY_BANDS. totals: sums of `sums`."""
    bands = len(ENTROPY_BANDS)
    counted = zip(ENTROPY_BANDS, totals[:bands], totals[bands : 2 * bands], strict=True)
    return {name: total / count for name, total, count in counted if count}


def calibration_errors(totals: Sequence[float], tokens: float) -> tuple[float, float]:
    """The expected calibration error of student and teacher over `tokens` valid tokens, at least one."""
    bins = totals[2 * len(ENTROPY_BANDS) :]
    student, teacher = bins[:CALIBRATION_BINS], bins[CALIBRATION_BINS:]
    return sum(map(abs, student)) / tokens, sum(map(abs, teacher)) / tokens

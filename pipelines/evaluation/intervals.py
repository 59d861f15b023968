"""95 % intervals of shares, and of differences between two models' answers to the same questions."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959964  # standard errors on either side


def wilson(count: int, total: int) -> list[float]:
    """[low, high] of the share count / total (Wilson 1927): inside 0 and 1, also where all or none are counted."""
    share, square = count / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The difference of two means over the same questions, ours - theirs, and whether it is larger than noise.

    Answers that are right or wrong: a question that only one of the two gets right is added for each (Bonett and Price,
    2012), so that a few questions prove nothing. Other scores: the standard error of the mean of the differences (arXiv
    2411.00640, section 4.2).
    """
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    found, count = math.fsum(apart) / len(apart), len(apart)
    if {*ours, *theirs} <= {0.0, 1.0}:
        more, fewer = apart.count(1.0) + 1, apart.count(-1.0) + 1
        middle = (more - fewer) / (count + 2)
        half = Z * math.sqrt(more + fewer - (more - fewer) ** 2 / (count + 2)) / (count + 2)
        return told(found, middle - half, middle + half)
    if count < 2:
        return told(found, None, None)
    variance = math.fsum((value - found) ** 2 for value in apart) / (count - 1)
    half = Z * math.sqrt(variance / count)
    return told(found, found - half, found + half)


def told(difference: float, low: float | None, high: float | None) -> dict[str, Any]:
    """As results.json has it; without an interval nothing is said of noise."""
    larger = None if low is None or high is None else low > 0 or high < 0
    return {"difference": difference, "low": low, "high": high, "larger_than_noise": larger}

"""What results.json says of one model's quality, and whether two models differ by more than noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.core.statistics import add_by_group, interval, resampled
from pipelines.model.quality import TEACHER, Quality
from pipelines.model.tally import COLUMNS

FIGURES = ("loss", "bits_per_byte", "kl", "agreement")  # those with an interval
PAIRS = (("student", "teacher"), ("student", "pruned"))  # whose differences are told
_OF_CLASS = ("loss", "kl", "agreement")
GROUPS = 256  # of documents, in results.json


def figures(found: Quality) -> dict[str, Any]:
    """One model's entry but for its intervals; shapes as stages/evaluate.py lists them."""
    bits = found.loss * found.tokens / math.log(2) / found.text_bytes if found.text_bytes else None
    perplexity = math.exp(found.loss) if found.loss < 700 else None  # beyond, it is no float64
    classes, positions = found.by_token_class or {}, found.by_position or []
    return {
        "loss": found.loss,
        "perplexity": perplexity,
        "bits_per_byte": bits,
        "kl": found.kl,
        "agreement": found.agreement,
        "overlap": found.overlap,
        "calibration_error": found.calibration_error,
        "kl_by_entropy": found.kl_by_entropy,
        "by_token_class": {
            name: {"share": row["tokens"] / found.tokens} | {figure: row[figure] for figure in _OF_CLASS}
            for name, row in classes.items()
        },
        "by_position": [
            {"from": start, "to": stop, "loss": row["loss"], "kl": row["kl"]} for start, stop, row in positions
        ],
        "reliability": [
            dict(zip(("confidence", "accuracy", "share"), row or (None, None, 0.0), strict=True))
            for row in found.reliability or []
        ],
    }


def entries(
    found: Mapping[str, Quality], intervals: Mapping[str, dict[str, list[float]]], told: Sequence[str] = FIGURES
) -> dict[str, dict[str, Any]]:
    """By model, those of its `figures` that are told, and "intervals" as `compared` gives them."""
    every = {name: figures(one) for name, one in found.items()}
    return {name: {key: every[name][key] for key in told} | {"intervals": intervals[name]} for name in found}


def compared(
    found: Mapping[str, Quality], pairs: Sequence[tuple[str, str]] = PAIRS
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, Any]], int]:
    """(95 % intervals {model: {figure: [low, high]}}, differences of these pairs, documents that they rest on).

    found: over the same documents, so that every model is drawn with the same ones. Without two documents
    there is nothing to draw, and neither intervals nor differences. A difference is larger than noise where its
    interval does not hold 0.
    """
    names = list(found)
    sums = torch.cat([_documents(found[name]) for name in names], dim=1)
    sums = sums[sums[:, COLUMNS.index("tokens")] > 0]
    if len(sums) < 2:
        return {name: {} for name in names}, [], len(sums)
    drawn = dict(zip(names, resampled(sums).split(len(COLUMNS), dim=1), strict=True))
    whole = dict(zip(names, sums.sum(0, keepdim=True).split(len(COLUMNS), dim=1), strict=True))
    intervals = {name: _intervals(drawn[name], _told(name, found)) for name in names}
    differences = []
    for model, other in pairs:
        if model not in found or other not in found:
            continue
        for figure in (figure for figure in _told(model, found) if figure in _told(other, found)):
            difference = _figure(whole[model], figure) - _figure(whole[other], figure)
            if not difference.isfinite():
                continue
            low, high = interval(_figure(drawn[model], figure) - _figure(drawn[other], figure))
            differences.append(
                {
                    "figure": figure,
                    "model": model,
                    "other": other,
                    "difference": difference.item(),
                    "low": low,
                    "high": high,
                    "larger_than_noise": low > 0 or high < 0,
                }
            )
    return intervals, differences, len(sums)


def _documents(found: Quality) -> Tensor:
    assert found.documents is not None, "measured without a Breakdown"
    return found.documents


def _told(name: str, found: Mapping[str, Quality]) -> Sequence[str]:
    """The figures that have a spread: a teacher agrees with itself, and without one nothing does."""
    return FIGURES[:2] if name == TEACHER or TEACHER not in found else FIGURES


def _intervals(drawn: Tensor, told: Sequence[str]) -> dict[str, list[float]]:
    values = {figure: _figure(drawn, figure) for figure in told}
    return {figure: list(interval(value)) for figure, value in values.items() if value.isfinite().any()}


def _figure(sums: Tensor, figure: str) -> Tensor:
    return ratio(dict(zip(COLUMNS, sums.unbind(1), strict=True)), figure)


def ratio(columns: Mapping[str, Tensor], figure: str) -> Tensor:
    """(rows,) of a figure from sums of "tokens", "bytes" and the figures; NaN where there is nothing to divide by."""
    if figure == "bits_per_byte":
        found = columns["loss"] / math.log(2) / columns["bytes"]
    else:
        found = columns[figure] / columns["tokens"]
    return torch.where(found.isfinite(), found, torch.nan)


def document_groups(found: Mapping[str, Quality]) -> dict[str, Any]:
    """{"tokens", "bytes", "models": {model: {"loss", "kl", "agreement"}}}, each a list of sums over GROUPS groups of
    documents, every GROUPS-th of one group, or over single ones where there are fewer: by which a later evaluation of
    the same text tells whether it differs by more than noise."""
    summed = {}
    for name, one in found.items():
        sums = _documents(one)
        sums = sums[sums[:, COLUMNS.index("tokens")] > 0]
        groups = torch.zeros(min(GROUPS, len(sums)), len(COLUMNS), dtype=torch.float64)
        add_by_group(groups, torch.arange(len(sums)) % GROUPS, sums)
        summed[name] = dict(zip(COLUMNS, groups.t().tolist(), strict=True))
    shared = next(iter(summed.values()))
    models = {name: {figure: columns[figure] for figure in _OF_CLASS} for name, columns in summed.items()}
    return {"tokens": shared["tokens"], "bytes": shared["bytes"], "models": models}

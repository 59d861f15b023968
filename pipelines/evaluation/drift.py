"""This evaluation against a stored one of the same text: what has moved, and whether by more than noise."""

from typing import Any

import torch
from torch import Tensor

from pipelines.config import UserError
from pipelines.core.statistics import interval, resampled
from pipelines.evaluation.comparison import FIGURES, ratio

SAME = ("split", "corpus", "sequence_length", "document_mask", "tokens")  # or the figures are of other text


def drift(results: dict[str, Any], baseline: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """[{"figure", "before", "now", "difference", "low", "high", "larger_than_noise"}] of every model that both have, on
    the split and on the domains of the same text.

    where: the baseline's file. Both were measured on the same documents, so both are drawn with the same ones: larger
    than noise is a difference whose 95 % interval does not hold 0. Without two documents there is no interval, and
    nothing is larger than noise. Raises UserError where the baseline is of another text.
    """
    for key in SAME:
        if baseline.get(key) != results[key]:
            raise UserError(
                f"evaluate.baseline={where}: expected an evaluation of the same text, found {key}={baseline.get(key)} "
                f"where this one has {results[key]}. Give one of this corpus and these settings."
            )
    found = _of_text("", results, baseline)
    for name, domain in results.get("domains", {}).items():
        before = baseline.get("domains", {}).get(name)
        if before and before.get("document_groups", {}).get("tokens") == domain["document_groups"]["tokens"]:
            found += _of_text(f"domains.{name}.", domain, before)
    return found


def _of_text(place: str, now: dict[str, Any], before: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for model, entry in now["models"].items():
        other = before["models"].get(model)
        if other is None:
            continue
        ours, theirs = _sums(now["document_groups"], model), _sums(before["document_groups"], model)
        enough = len(ours) > 1
        drawn = resampled(torch.cat([ours, theirs], dim=1)).split(ours.shape[1], dim=1) if enough else None
        for figure in FIGURES:
            if entry[figure] is None or other[figure] is None or (model == "teacher" and figure in FIGURES[2:]):
                continue
            row = {
                "figure": f"{model}.{place}{figure}",
                "before": other[figure],
                "now": entry[figure],
                "difference": entry[figure] - other[figure],
                "low": None,
                "high": None,
                "larger_than_noise": False,
            }
            if drawn is not None:
                low, high = interval(_ratio(drawn[0], figure) - _ratio(drawn[1], figure))
                row |= {"low": low, "high": high, "larger_than_noise": low > 0 or high < 0}
            rows.append(row)
    return rows


_COLUMNS = ("tokens", "bytes", "loss", "kl", "agreement")


def _sums(groups: dict[str, Any], model: str) -> Tensor:
    """(groups, _COLUMNS) float64."""
    columns = {"tokens": groups["tokens"], "bytes": groups["bytes"]} | groups["models"][model]
    return torch.tensor([columns[name] for name in _COLUMNS], dtype=torch.float64).t()


def _ratio(sums: Tensor, figure: str) -> Tensor:
    return ratio(dict(zip(_COLUMNS, sums.unbind(1), strict=True)), figure)

"""Sums of a model's figures over groups of tokens: by the teacher's entropy, confidence, class, position and document.

Every group has the same columns, so that any figure of any group is a ratio of two of them. The sums lie on the CPU and
are added in the order of the tokens: a GPU would add them in another order each time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from pipelines.core import telemetry
from pipelines.core.divergence import TokenTerms
from pipelines.core.loss import valid_tokens
from pipelines.core.statistics import add_by_group
from pipelines.text.token_classes import CLASSES, TokenClasses

Batch = Mapping[str, Tensor]
Array = numpy.ndarray[Any, Any]

# bytes: UTF-8 bytes behind the labels. confidence: the greatest probability; correct: where that is the label's.
COLUMNS = ("tokens", "bytes", "loss", "kl", "agreement", "overlap", "confidence", "correct")


@dataclass(frozen=True)
class Breakdown:
    """By what a measurement is broken down.

    documents: (documents,) int64, ascending: the numbers that batch["documents"] may hold, of the document of each
    label. classes: of the tokenizer. token_bytes: (vocabulary,) float64 UTF-8 bytes that each id stands for, a mean
    where the tokenizer does not tell. sequence_length: tokens, to which positions are counted.
    """

    documents: Array
    classes: TokenClasses
    token_bytes: Array
    sequence_length: int

    def bounds(self) -> list[int]:
        """Of the bands of positions: 0, 1, 2, 4, 8 up to the sequence length. A band has its lower bound, not its
        upper. A position is the number of tokens before a token's prediction is read, less one: 0 is the first."""
        powers = [1 << power for power in range(self.sequence_length.bit_length())]
        return [0, *(power for power in powers if power < self.sequence_length), self.sequence_length]

    def groups(self, batch: Batch) -> dict[str, Tensor]:
        """{grouping: (tokens,) int64 place of each token's group}. batch: on the CPU."""
        tokens, labels = (batch[name].flatten().numpy() for name in ("tokens", "labels"))
        known = numpy.maximum(labels, 0)  # a label of -100 is not counted, and has no class
        places = numpy.searchsorted(self.documents, batch["documents"].flatten().numpy())
        inner = torch.tensor(self.bounds()[1:-1])
        return {
            "classes": torch.from_numpy(self.classes.of(tokens, known)),
            "positions": torch.bucketize(batch["position_ids"].flatten(), inner, right=True),
            "documents": torch.from_numpy(numpy.minimum(places, len(self.documents) - 1)),
        }


class Tally:
    """Sums of one model. by: None: of the whole, by entropy and by confidence alone, without bytes."""

    def __init__(self, by: Breakdown | None) -> None:
        self.by = by
        self.sizes = {"all": 1, "entropy": len(telemetry.ENTROPY_BANDS), "confidence": telemetry.CALIBRATION_BINS}
        if by is not None:
            self.sizes |= {"classes": len(CLASSES) + 1, "positions": len(by.bounds()) - 1}
            self.sizes |= {"documents": len(by.documents)}
        self.sums = torch.zeros(sum(self.sizes.values()), len(COLUMNS), dtype=torch.float64)

    def __getitem__(self, grouping: str) -> Tensor:
        """(groups, columns): a view."""
        first = 0
        for name, size in self.sizes.items():
            if name == grouping:
                return self.sums[first : first + size]
            first += size
        raise KeyError(grouping)

    def add(self, terms: TokenTerms, batch: Batch, groups: Mapping[str, Tensor]) -> None:
        """Add a batch's valid tokens. terms: (tokens,) each, on any device; batch, groups: on the CPU."""
        valid = valid_tokens(batch["labels"], batch["loss_mask"]).flatten()
        seen, labels = terms.telemetry, batch["labels"].flatten()[valid]
        measured = [terms.ce, terms.kd, terms.agreement]
        measured += [seen.overlap, seen.student_confidence, seen.student_correct] if seen else [None] * 3
        like = terms.ce
        assert like is not None
        rows = torch.stack([torch.zeros_like(like) if row is None else row for row in measured])
        values = torch.ones(int(valid.sum()), len(COLUMNS), dtype=torch.float64)
        values[:, 2:] = rows.cpu().double()[:, valid].t()
        if self.by is not None:
            values[:, 1] = torch.from_numpy(self.by.token_bytes[labels.numpy()])
        places = {name: group[valid] for name, group in groups.items()} | {"all": torch.zeros_like(labels)}
        if seen is not None:
            places["entropy"] = telemetry.entropy_band(seen.teacher_entropy.cpu().double())[valid]
            places["confidence"] = telemetry.calibration_bin(values[:, COLUMNS.index("confidence")])
        for name, group in places.items():
            add_by_group(self[name], group, values)


def means(sums: Tensor) -> list[dict[str, float] | None]:
    """Of each group {column: mean per token, and "tokens": their number}; None of one without tokens."""
    found: list[dict[str, float] | None] = []
    for tokens, *others in sums.tolist():
        named = zip(COLUMNS[1:], others, strict=True)
        found.append({"tokens": tokens} | {name: total / tokens for name, total in named} if tokens else None)
    return found

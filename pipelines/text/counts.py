"""What a corpus holds: documents, tokens and bytes per split and source, and the entropy of its tokens."""

from dataclasses import dataclass, field
from typing import Any

import numpy

from pipelines.text.splitting import SPLITS

Array = numpy.ndarray[Any, Any]


@dataclass
class Count:
    """bytes: UTF-8 bytes of the text, None where the tokenizer cannot tell."""

    documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    bytes: int = 0

    def add(self, documents: int, tokens: int, text_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.bytes += text_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes / self.tokens if self.tokens else None,
        }


@dataclass
class SourceCounts:
    """One source. unigrams: (vocabulary,) how often each id stands in the train split."""

    name: str
    path: str
    kind: str
    weight: float
    unigrams: Array
    splits: dict[str, Count] = field(default_factory=lambda: {split: Count() for split in SPLITS})
    empty_documents: int = 0  # left out
    byte_exact: bool = True  # the bytes per id sum to the text's bytes

    @property
    def documents(self) -> int:
        return sum(count.documents for count in self.splits.values())


def entropy(sources: list[SourceCounts]) -> float:
    """Entropy in nats/token of one token drawn from the weighted blend of the train splits: -sum p log p."""
    parts = [(s.weight, s.unigrams / s.unigrams.sum()) for s in sources if s.unigrams.sum()]
    blend = sum(weight * share for weight, share in parts) / sum(weight for weight, _ in parts)
    present = blend[blend > 0]
    return float(-(present * numpy.log(present)).sum())


def summary(sources: list[SourceCounts]) -> dict[str, Any]:
    """The content of counts.json: {"unigram_entropy": nats/token, "splits": {split: {documents, tokens, bytes,
    bytes_per_token, "sources": {name: the same}}}, "sources": {name: path, kind, weight, empty_documents}}."""
    splits: dict[str, Any] = {}
    for split in SPLITS:
        total = Count()
        for source in sources:
            part = source.splits[split]
            total.add(part.documents, part.tokens, part.bytes)
        parts = {s.name: s.splits[split].as_dict() for s in sources if s.splits[split].documents}
        splits[split] = total.as_dict() | {"sources": parts}
    described = {
        s.name: {"path": s.path, "kind": s.kind, "weight": s.weight, "empty_documents": s.empty_documents}
        for s in sources
    }
    return {"unigram_entropy": entropy(sources), "splits": splits, "sources": described}

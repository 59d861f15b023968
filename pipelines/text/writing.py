"""The documents of a text source, encoded, into one Megatron data set per split."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy

from pipelines.console import Bar
from pipelines.text import indexed
from pipelines.text.counts import SourceCounts
from pipelines.text.encoding import Encoded, Encoder, in_order
from pipelines.text.sources import Source
from pipelines.text.splitting import SPLITS, Fractions


class Speed:
    """Moves a progress bar by input bytes and says how fast text and tokens go by."""

    def __init__(self, bar: Bar, bytes_per_unit: float) -> None:
        self.bar, self.bytes_per_unit = bar, bytes_per_unit
        self.started, self.done, self.tokens = time.monotonic(), 0, 0

    def advance(self, input_size: int, tokens: int = 0) -> None:
        self.done += input_size
        self.tokens += tokens
        seconds = max(time.monotonic() - self.started, 1e-3)
        detail = f"{self.done / seconds / 1e6:.1f} MB/s"
        detail += f"  {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        self.bar.advance(input_size / self.bytes_per_unit, detail)


def limited(encoded: Iterable[Encoded], limit_bytes: int | None) -> Iterator[Encoded]:
    """The documents up to the one that reaches limit_bytes of text: the same whatever the chunks are."""
    left = limit_bytes
    for part in encoded:
        if left is None:
            yield part
            continue
        reached = numpy.cumsum(part.text_bytes)
        documents = int(numpy.searchsorted(reached, left)) + 1
        yield part.first(documents)
        left -= int(reached[-1]) if len(reached) else 0
        if left <= 0:
            return


def train_texts(
    source: Source, fractions: Fractions, limit_bytes: int | None, share: int, speed: Speed
) -> Iterator[str]:
    """A source's documents of the train split, up to `share` bytes of them, to train a tokenizer on."""
    left, wanted = limit_bytes, share
    for chunk in source.chunks():
        for text in chunk.documents():
            data = text.encode()
            if data and fractions.side(data) == 0:
                yield text
                wanted -= len(data)
            if left is not None:
                left -= len(data)
            if wanted <= 0 or (left is not None and left <= 0):
                return
        speed.advance(chunk.size)


def write_source(
    source: Source,
    encoder: Encoder,
    counts: SourceCounts,
    directory: Path,
    limit_bytes: int | None,
    workers: int,
    speed: Speed,
) -> None:
    """Write <directory>/<split>/<counts.name>.bin and .idx of every split that has a document, and fill counts."""
    writers: dict[str, indexed.Writer] = {}
    parts = in_order(encoder, source.chunks(), workers)
    try:
        for encoded in limited(parts, limit_bytes):
            for side, split in enumerate(SPLITS):
                chosen = encoded.sides == side
                if not chosen.any():
                    continue
                if split not in writers:
                    writers[split] = indexed.Writer(directory / split / counts.name, encoder.id_type)
                lengths = encoded.lengths[chosen]
                ids = encoded.ids[numpy.repeat(chosen, encoded.lengths)]
                writers[split].add(ids, lengths)
                counts.splits[split].add(len(lengths), len(ids), int(encoded.text_bytes[chosen].sum()))
                if side == 0:
                    counts.unigrams += numpy.bincount(ids, minlength=len(counts.unigrams))
            counts.empty_documents += encoded.empty
            counts.byte_exact &= encoded.byte_exact
            speed.advance(encoded.input_size, len(encoded.ids))
        for writer in writers.values():
            writer.finish()
    finally:
        parts.close()
        for writer in writers.values():
            writer.abandon()

"""An existing Megatron data set as a source: checked against the tokenizer and split without copying a token."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from tokenizers import Tokenizer

from pipelines.config import UserError
from pipelines.text import indexed, tokenizer
from pipelines.text.counts import SourceCounts
from pipelines.text.encoding import in_order
from pipelines.text.splitting import SPLITS, Fractions
from pipelines.text.writing import Speed

Array = numpy.ndarray[Any, Any]

TOKENS = 1 << 20  # of a piece of work, about


def prefix_of(path: str) -> Path:
    """The prefix, from itself or from one of its two files."""
    return Path(path.removesuffix(".bin").removesuffix(".idx"))


@dataclass(frozen=True)
class Scanned:
    """What documents start..stop hold. sides: (documents,); tokens, bytes, documents: (splits,); unigrams of train."""

    sides: Array
    tokens: Array
    bytes: Array
    unigrams: Array
    ended: int  # documents with an end-of-document token
    input_size: int


@dataclass
class Scanner:
    """Reads documents start..stop. Their side is decided by their text, so that it is the side they have in a text
    source; for a tokenizer that is not byte-level by their ids instead, as int32 without the end-of-document token."""

    prefix: Path
    directory: Path  # of the tokenizer
    vocabulary: tokenizer.Vocabulary
    fractions: Fractions

    @cached_property
    def _index(self) -> indexed.Index:
        return indexed.read_index(self.prefix)

    @cached_property
    def _ids(self) -> Array:
        return indexed.read_ids(self.prefix, self._index)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.directory)

    def __call__(self, documents: tuple[int, int]) -> Scanned:
        start, stop = documents
        sides = numpy.zeros(stop - start, numpy.uint8)
        tokens, text_bytes = numpy.zeros(len(SPLITS), numpy.int64), numpy.zeros(len(SPLITS), numpy.int64)
        train, ended = [numpy.empty(0, numpy.int64)], 0
        for document in range(start, stop):
            ids = self._document(document)
            has_end = len(ids) > 0 and ids[-1] == self.vocabulary.end_of_document
            if self.vocabulary.pieces is not None:
                content = text = self.vocabulary.text(ids)
            else:
                content = (ids[:-1] if has_end else ids).astype("<i4").tobytes()
                text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()
            side = self.fractions.side(content)
            sides[document - start] = side
            tokens[side] += len(ids)
            text_bytes[side] += len(text)
            ended += int(has_end)
            if side == 0:
                train.append(ids)
        unigrams = numpy.bincount(numpy.concatenate(train), minlength=self.vocabulary.size)
        return Scanned(sides, tokens, text_bytes, unigrams, ended, int(tokens.sum()) * self._index.id_type.itemsize)

    def _document(self, document: int) -> Array:
        """The ids of a document, (tokens,) int64, checked against the vocabulary."""
        index, parts = self._index, []
        for sequence in range(index.documents[document], index.documents[document + 1]):
            begin = int(index.pointers[sequence]) // index.id_type.itemsize
            parts.append(self._ids[begin : begin + int(index.lengths[sequence])])
        ids = numpy.concatenate(parts).astype(numpy.int64) if parts else numpy.empty(0, numpy.int64)
        if len(ids) and (ids.max() >= self.vocabulary.size or ids.min() < 0):
            wrong = int(ids[(ids >= self.vocabulary.size) | (ids < 0)][0])
            raise UserError(
                f"{self.prefix}.bin, document {document + 1}: expected ids below {self.vocabulary.size:,}, the size of "
                f"the tokenizer; found {wrong:,}. Set data.tokenizer to the one that these ids were made with."
            )
        return ids


def _pieces(index: indexed.Index) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about TOKENS tokens."""
    for start, stop in indexed.blocks(index.document_count):
        first = index.documents[start]
        tokens = numpy.cumsum(index.lengths[first : index.documents[stop]], dtype=numpy.int64)
        ends = numpy.concatenate([[0], tokens])[index.documents[start + 1 : stop + 1] - first]  # per document
        begin = start
        while begin < stop:
            done = int(ends[begin - start - 1]) if begin > start else 0
            end = min(start + int(numpy.searchsorted(ends, done + TOKENS)) + 1, stop)
            yield begin, end
            begin = end


def split_existing(scanner: Scanner, counts: SourceCounts, directory: Path, workers: int, speed: Speed) -> int:
    """Write <directory>/<split>/<counts.name>.idx of every split that has a document, its .bin a link to the source's,
    and fill counts. Returns how many documents end with the end-of-document token."""
    index = indexed.read_index(scanner.prefix)
    sides: list[Array] = []
    ended = 0
    for scanned in in_order(scanner, _pieces(index), workers):
        sides.append(scanned.sides)
        ended += scanned.ended
        counts.unigrams += scanned.unigrams
        documents = numpy.bincount(scanned.sides, minlength=len(SPLITS))
        for side, split in enumerate(SPLITS):
            counts.splits[split].add(int(documents[side]), int(scanned.tokens[side]), int(scanned.bytes[side]))
        speed.advance(scanned.input_size, int(scanned.tokens.sum()))
    every = numpy.concatenate(sides) if sides else numpy.empty(0, numpy.uint8)
    for side, split in enumerate(SPLITS):
        if counts.splits[split].documents:
            indexed.write_selection(scanner.prefix, index, every == side, directory / split / counts.name)
    return ended

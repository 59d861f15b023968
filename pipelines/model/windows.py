"""A split of the corpus cut into windows of tokens, in batches for each data-parallel rank.

The documents of a split stand one behind the other as one stream of T tokens. Window i holds the tokens
[i * L, i * L + L] for a sequence length of L: inputs without the last, labels without the first. So every token of the
stream but the first is a label exactly once, at every layout, and ceil((T - 1) / L) windows hold it all.

With an end-of-document token given, each document stands alone (model/documents.py): what follows one is no label, and
the batches are separated ones.

Bytes of the text behind the labels, for bits per byte: exact where the corpus has token_bytes.npy (a byte-level
tokenizer: each id stands for a fixed number of UTF-8 bytes, the end of a document for none; the corpus stage has
checked that these sum to the text's bytes), else labels times the split's mean bytes per token of counts.json.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from pipelines.config import UserError, expect
from pipelines.model.documents import separated
from pipelines.text import indexed
from pipelines.vocabulary import read_blend


def split_prefixes(corpus: Path, split: str) -> list[Path]:
    """The .bin/.idx prefixes of a split. Raises UserError where the corpus has no such split or nothing in it."""
    return [prefix for prefix, _ in split_blend(corpus, split)]


def split_blend(corpus: Path, split: str) -> list[tuple[Path, float]]:
    """The .bin/.idx prefixes of a split with their weights, which sum to 1."""
    splits = read_blend(corpus)["splits"]
    if not splits.get(split):
        filled = ", ".join(name for name, parts in splits.items() if parts)
        raise UserError(
            f"{corpus}: expected a split {split!r} with documents, found {filled}. "
            f"Make the corpus with data.{split}_fraction above 0, or name another split."
        )
    return [(corpus / part["prefix"], float(part["weight"])) for part in splits[split]]


def end_of_document(corpus: Path, *splits: str) -> int:
    """The id that ends every document of these splits. Looks at the first thousand documents of each data set.

    Raises UserError where there is none: an existing Megatron data set may have been written without.
    """
    end = read_blend(corpus).get("eod")
    expect(type(end) is int, str(corpus / "blend.json"), "an eod, the end-of-document id", end, "Make it again.")
    assert isinstance(end, int)
    for prefix in (prefix for split in splits for prefix in split_prefixes(corpus, split)):
        index = indexed.read_index(prefix)
        ids, size = indexed.read_ids(prefix, index), index.id_type.itemsize
        for number in range(min(index.document_count, 1000)):
            first, last = int(index.documents[number]), int(index.documents[number + 1]) - 1
            if last < first or not index.lengths[last]:
                continue
            found = int(ids[int(index.pointers[last]) // size + int(index.lengths[last]) - 1])
            expected = f"documents that end with the end-of-document token {end}"
            remedy = "Write it again with such a token, or set document_mask=false."
            expect(found == end, str(prefix), expected, f"token {found} at the end of document {number + 1}", remedy)
    return end


class Windows:
    """Windows of sequence_length + 1 tokens over the given data sets; memory-mapped, only what is asked for is read.

    end_of_document: the id after which a document begins that sees nothing of those before it; None: windows are whole.
    """

    def __init__(self, prefixes: Sequence[Path], sequence_length: int, end_of_document: int | None = None) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length: expected 1 token or more, found {sequence_length}.")
        self.sequence_length, self.end_of_document = sequence_length, end_of_document
        self._indices = [indexed.read_index(prefix) for prefix in prefixes]
        self._ids = [indexed.read_ids(prefix, index) for prefix, index in zip(prefixes, self._indices, strict=True)]
        # ends[p][s]: tokens of data set p up to the end of its sequence s
        self._ends = [numpy.cumsum(index.lengths, dtype=numpy.int64) for index in self._indices]
        sizes = [int(ends[-1]) if len(ends) else 0 for ends in self._ends]
        self._starts = numpy.concatenate([[0], numpy.cumsum(sizes, dtype=numpy.int64)])
        self.tokens = int(self._starts[-1])
        if self.tokens < 2:
            names = ", ".join(map(str, prefixes)) or "no data set"
            raise UserError(f"{names}: expected a split of 2 tokens or more, found {self.tokens}. Give more text.")

    @property
    def labels(self) -> int:
        """How many tokens follow another one in all windows together: every token of the split but its first."""
        return self.tokens - 1

    def __len__(self) -> int:
        return (self.labels + self.sequence_length - 1) // self.sequence_length

    def __getitem__(self, window: int) -> torch.Tensor:
        """(sequence_length + 1,) int64; the last window is filled up with 0."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        start = window * self.sequence_length
        found = torch.zeros(self.sequence_length + 1, dtype=torch.int64)
        tokens = self._read(start, min(start + self.sequence_length + 1, self.tokens))
        found[: len(tokens)] = torch.from_numpy(tokens)
        return found

    def mask(self, window: int) -> torch.Tensor:
        """(sequence_length,) float32: 1 where the label, token [1:] of the window, is one of the split's, and with
        end_of_document of the same document as the token before it."""
        valid = min(self.labels - window * self.sequence_length, self.sequence_length)
        counted = torch.arange(self.sequence_length) < valid
        if self.end_of_document is not None:
            counted &= self[window][:-1] != self.end_of_document
        return counted.float()

    @cached_property
    def _document_ends(self) -> numpy.ndarray[Any, Any]:
        """(documents,) int64: where each document of the stream ends, in tokens."""
        parts = [
            start + numpy.concatenate([[0], ends])[index.documents[1:]]
            for start, ends, index in zip(self._starts, self._ends, self._indices, strict=False)
        ]
        return numpy.concatenate(parts)

    def documents(self, window: int) -> torch.Tensor:
        """(sequence_length,) int64: the number of the document that each label of the window is of, from 0; behind the
        split's end any. A document that several windows hold has one number."""
        places = window * self.sequence_length + 1 + numpy.arange(self.sequence_length)
        return torch.from_numpy(numpy.searchsorted(self._document_ends, places, side="right"))

    def documents_of(self, chosen: Sequence[int]) -> numpy.ndarray[Any, Any]:
        """(documents,) int64, ascending: the numbers of those that the chosen windows have labels of."""
        starts = numpy.asarray(chosen, numpy.int64) * self.sequence_length
        stops = numpy.minimum(starts + self.sequence_length, self.tokens - 1)
        first, last = (numpy.searchsorted(self._document_ends, at, side="right") for at in (starts + 1, stops))
        change = numpy.zeros(len(self._document_ends) + 1, numpy.int64)
        numpy.add.at(change, first, 1)
        numpy.add.at(change, last + 1, -1)
        return numpy.flatnonzero(numpy.cumsum(change[:-1]))

    def _read(self, start: int, stop: int) -> numpy.ndarray[Any, Any]:
        """Tokens start..stop of the stream, int64, sequence by sequence: the pointers may skip parts of a .bin."""
        parts = []
        while start < stop:
            part = int(numpy.searchsorted(self._starts, start, side="right")) - 1
            index, ends, offset = self._indices[part], self._ends[part], start - int(self._starts[part])
            sequence = int(numpy.searchsorted(ends, offset, side="right"))
            inside = offset - (int(ends[sequence]) - int(index.lengths[sequence]))
            count = min(stop - start, int(index.lengths[sequence]) - inside)
            begin = int(index.pointers[sequence]) // index.id_type.itemsize + inside
            parts.append(self._ids[part][begin : begin + count].astype(numpy.int64))
            start += count
        return numpy.concatenate(parts)

    def laid_out(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of some windows as models take it: with end_of_document one row, as documents.separated gives it."""
        return batch if self.end_of_document is None else separated(batch, self.end_of_document)


class LongDocuments(Windows):
    """One window for each document that has more than sequence_length tokens: its beginning."""

    def __init__(self, prefixes: Sequence[Path], sequence_length: int) -> None:
        super().__init__(prefixes, sequence_length)
        starts = numpy.concatenate([[0], self._document_ends[:-1]])
        lengths = self._document_ends - starts
        self._long = starts[lengths > sequence_length]
        if not len(self._long):
            raise UserError(
                f"expected documents of more than {sequence_length} tokens, found none: the longest has "
                f"{int(lengths.max())}. Name a shorter length, or a split with longer documents."
            )

    def __len__(self) -> int:
        return len(self._long)

    def __getitem__(self, window: int) -> torch.Tensor:
        start = int(self._long[window])
        return torch.from_numpy(self._read(start, start + self.sequence_length + 1))

    def mask(self, window: int) -> torch.Tensor:
        return torch.ones(self.sequence_length)

    def documents(self, window: int) -> torch.Tensor:
        return torch.full((self.sequence_length,), window)

    def documents_of(self, chosen: Sequence[int]) -> numpy.ndarray[Any, Any]:
        return numpy.asarray(chosen, numpy.int64)


def batches(
    windows: Windows,
    micro_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    limit: int | None = None,
    *,
    documents: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro batches of one data-parallel rank: the same number on each rank, all of the same shape.

    limit: micro batches per rank; where that is less than everything, the windows are spread evenly over the split.
    documents: each batch also has "documents", as `Windows.documents` numbers them.
    Ranks without a window of their own in the last round get one whose mask is all 0.

    Yields tokens, labels, position_ids: (micro_batch_size, sequence_length) int64; loss_mask: the same, float32.
    With windows.end_of_document they are one row, as `documents.separated` gives it.
    """
    chosen = chosen_windows(windows, micro_batch_size, data_size, limit)
    positions = torch.arange(windows.sequence_length).repeat(micro_batch_size, 1)
    step = micro_batch_size * data_size
    for first in range(0, len(chosen), step):
        start = first + data_rank * micro_batch_size
        mine = chosen[start : start + micro_batch_size]
        rows = torch.zeros(micro_batch_size, windows.sequence_length + 1, dtype=torch.int64)
        mask = torch.zeros(micro_batch_size, windows.sequence_length)
        numbers = torch.zeros(micro_batch_size, windows.sequence_length, dtype=torch.int64)
        for row, window in enumerate(mine):
            rows[row], mask[row] = windows[window], windows.mask(window)
            if documents:
                numbers[row] = windows.documents(window)
        batch = {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "position_ids": positions,
            "loss_mask": mask,
        }
        yield windows.laid_out(batch | ({"documents": numbers} if documents else {}))


def chosen_windows(windows: Windows, micro_batch_size: int, data_size: int = 1, limit: int | None = None) -> list[int]:
    """The windows that `batches` deals out to all data-parallel ranks together, in order."""
    if micro_batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"expected 1 or more as micro_batch_size and limit, found {micro_batch_size} and {limit}.")
    wanted = len(windows) if limit is None else min(len(windows), limit * micro_batch_size * data_size)
    return [number * len(windows) // wanted for number in range(wanted)]


def token_bytes(corpus: Path) -> torch.Tensor | None:
    """(vocab_size,) int32 UTF-8 bytes that each id stands for; None where the tokenizer is not byte-level."""
    name = read_blend(corpus)["token_bytes"]
    return torch.from_numpy(numpy.load(corpus / name)) if name else None


def mean_token_bytes(corpus: Path, split: str, vocab_size: int) -> numpy.ndarray[Any, Any]:
    """(vocab_size,) float64 UTF-8 bytes that each id stands for, for bits per byte = sum of the labels' losses in nats
    / ln 2 / sum of their bytes. Where the tokenizer is not byte-level, the mean of the split's tokens for each."""
    table = token_bytes(corpus)
    if table is None:
        count = json.loads((corpus / "counts.json").read_text())["splits"][split]
        return numpy.full(vocab_size, count["bytes"] / count["tokens"])
    found = numpy.zeros(max(vocab_size, len(table)))
    found[: len(table)] = table.numpy()
    return found


def row_hashes(tokens: torch.Tensor) -> torch.Tensor:
    """tokens: (rows, sequence) int64. Returns a 32-bit hash of each row, (rows,) int64 on the CPU: the same everywhere.

    Added up over a step's rows they tell, whatever rank has which row, whether two runs have consumed the same.
    """
    tokens = tokens.cpu()
    found = torch.full(tokens.shape[:1], 0x345678, dtype=torch.int64)
    places = torch.arange(1, tokens.shape[1] + 1, dtype=torch.int64) * 0x9E3779B97F4A7C1 | 1  # odd, of each place
    mixed = (tokens + 0x5851F42D) * places  # int64 wraps around alike on every machine
    found = found + ((mixed ^ (mixed >> 29)) * 0x14057B7EF767814F).sum(dim=1)
    return ((found ^ (found >> 32)) * 0x2545F4914F6CDD1D >> 31) & 0xFFFFFFFF

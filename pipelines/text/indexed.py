"""Megatron's .bin/.idx format: token ids in a flat file, and an index of sequences and documents. numpy only.

.idx, little endian: 9 bytes MMIDIDX, uint64 version 1, uint8 code of the id type, uint64 sequences S, uint64 documents
D + 1, int32 lengths (S,) in tokens, int64 pointers (S,) in bytes into the .bin, int64 document starts (D + 1,) counted
in sequences. The same bytes as megatron-core 0.15.3's IndexedDatasetBuilder writes, but streamed: memory does not grow
with the number of documents.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from pipelines import index_header
from pipelines.config import UserError

Array = numpy.ndarray[Any, Any]

ID_TYPES: dict[int, Any] = {
    1: numpy.uint8,
    2: numpy.int8,
    3: numpy.int16,
    4: numpy.int32,
    5: numpy.int64,
    8: numpy.uint16,
}
BLOCK = 1 << 20  # entries of an index handled at a time


def id_type(vocab_size: int) -> numpy.dtype[Any]:
    """The id type Megatron takes for a vocabulary (DType.optimal_dtype): 128,256 ids do not fit uint16."""
    return numpy.dtype(numpy.uint16 if vocab_size < index_header.WIDE else numpy.int32)


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class Index:
    """A memory-mapped .idx. lengths: (S,) tokens; pointers: (S,) bytes into the .bin; documents: (D + 1,) sequences."""

    id_type: numpy.dtype[Any]
    lengths: Array
    pointers: Array
    documents: Array

    @property
    def document_count(self) -> int:
        return len(self.documents) - 1


def read_index(prefix: Path) -> Index:
    """Map an .idx and check it against its .bin. Raises UserError when one is missing, truncated or of another kind."""
    path = idx_path(prefix)
    for needed in (path, bin_path(prefix)):
        if not needed.is_file():
            raise UserError(
                f"{prefix}: expected a Megatron data set {prefix}.bin and {prefix}.idx, found no {needed}. "
                "Give the prefix without an ending, with both files beside each other."
            )
    header, start = index_header.read(path), index_header.START
    sequences = header.sequences
    content = numpy.memmap(path, mode="r")
    index = Index(
        numpy.dtype(ID_TYPES[header.code]),
        content[start:][: 4 * sequences].view(numpy.int32),
        content[start + 4 * sequences :][: 8 * sequences].view(numpy.int64),
        content[start + 12 * sequences :].view(numpy.int64),
    )
    _check(prefix, index)
    return index


def _check(prefix: Path, index: Index) -> None:
    if not len(index.documents) or index.documents[0] != 0 or index.documents[-1] != len(index.lengths):
        raise UserError(f"{idx_path(prefix)}: expected documents that cover every sequence. Write the data set again.")
    needed = 0
    for start, stop in blocks(len(index.lengths)):
        ends = index.pointers[start:stop] + index.lengths[start:stop].astype(numpy.int64) * index.id_type.itemsize
        needed = max(needed, int(ends.max()))
    found = bin_path(prefix).stat().st_size
    if found < needed:
        raise UserError(
            f"{bin_path(prefix)}: expected at least {needed:,} bytes by its .idx, found {found:,}. "
            "It is truncated: copy or write it again."
        )


def read_ids(prefix: Path, index: Index) -> Array:
    """Every id of the .bin, memory-mapped: (file size / id size,). An empty .bin gives an empty array."""
    path = bin_path(prefix)
    if path.stat().st_size < index.id_type.itemsize:
        return numpy.empty(0, index.id_type)
    return numpy.memmap(path, dtype=index.id_type, mode="r", shape=(path.stat().st_size // index.id_type.itemsize,))


class Writer:
    """Writes <prefix>.bin as documents arrive, one sequence per document, and <prefix>.idx at the end.

    A full disk raises OSError with the path in `filename`.
    """

    def __init__(self, prefix: Path, ids: numpy.dtype[Any]) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.id_type = prefix, ids
        self.documents = self.tokens = 0
        self._lengths_path = prefix.with_name(prefix.name + ".lengths")
        self._bin, self._lengths = bin_path(prefix).open("wb"), self._lengths_path.open("wb")

    def add(self, ids: Array, lengths: Array) -> None:
        """Append documents. ids: (sum of lengths,), one document after the other; lengths: (documents,) in tokens."""
        assert len(ids) == int(lengths.sum())
        _write(self._bin, ids.astype(self.id_type, copy=False))
        _write(self._lengths, lengths.astype("<i4", copy=False))
        self.documents += len(lengths)
        self.tokens += len(ids)

    def finish(self) -> None:
        _close(self._bin)
        _close(self._lengths)
        lengths = numpy.memmap(self._lengths_path, "<i4", "r") if self.documents else numpy.empty(0, "<i4")
        with idx_path(self.prefix).open("wb") as file:
            _write_head(file, self.id_type, self.documents, self.documents + 1)
            _write(file, lengths)
            pointer = 0
            for start, stop in blocks(self.documents):
                ends = pointer + numpy.cumsum(lengths[start:stop], dtype=numpy.int64) * self.id_type.itemsize
                _write(file, numpy.concatenate([[pointer], ends[:-1]]).astype("<i8"))
                pointer = int(ends[-1])
            for start, stop in blocks(self.documents + 1):
                _write(file, numpy.arange(start, stop, dtype="<i8"))
            _close(file)
        self._lengths_path.unlink()

    def abandon(self) -> None:
        """Close the files of a data set that will not be finished; after `finish` it does nothing."""
        for file in (self._bin, self._lengths):
            with suppress(OSError):  # a full disk, again, for what is still in the buffer
                file.close()


def write_selection(source: Path, index: Index, chosen: Array, prefix: Path) -> None:
    """A data set of the chosen documents without copying a token: a new .idx, and a .bin that links to the source's.

    chosen: (documents,) bool. The pointers skip what is not chosen: readers must go by sequence (GPTDataset and
    `IndexedDataset.get` do), not by slices over several sequences.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    bin_path(prefix).symlink_to(bin_path(source).resolve())
    sizes = numpy.diff(index.documents)  # sequences per document
    sequences, documents = int(sizes[chosen].sum()), int(chosen.sum())
    with idx_path(prefix).open("wb") as file:
        _write_head(file, index.id_type, sequences, documents + 1)
        for column in (index.lengths, index.pointers):
            for start, stop in blocks(index.document_count):
                taken = numpy.repeat(chosen[start:stop], sizes[start:stop])
                _write(file, column[index.documents[start] : index.documents[stop]][taken])
        _write(file, numpy.zeros(1, "<i8"))
        done = 0
        for start, stop in blocks(index.document_count):
            ends = done + numpy.cumsum(sizes[start:stop][chosen[start:stop]])
            _write(file, ends.astype("<i8"))
            done = int(ends[-1]) if len(ends) else done
        _close(file)


def blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)


def _write_head(file: BinaryIO, ids: numpy.dtype[Any], sequences: int, documents: int) -> None:
    code = next(code for code, kind in ID_TYPES.items() if numpy.dtype(kind) == ids)
    file.write(index_header.MAGIC + index_header.HEADER.pack(1, code, sequences, documents))


def _write(file: BinaryIO, values: Array) -> None:
    try:
        file.write(numpy.ascontiguousarray(values).data)
    except OSError as error:
        error.filename = file.name
        raise


def _close(file: BinaryIO) -> None:
    try:
        file.flush()
        os.fsync(file.fileno())
        file.close()
    except OSError as error:
        error.filename = file.name
        raise

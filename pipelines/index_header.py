"""What the head of a Megatron .idx says, without numpy or torch: ids, sequences, documents, and tokens by its lengths.

text/indexed.py has the whole format, and reads and writes it.
"""

import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")  # version, code of the id type, sequences, documents + 1
START = len(MAGIC) + HEADER.size  # where the lengths begin
CODES = (1, 2, 3, 4, 5, 8)  # uint8, int8, int16, int32, int64, uint16
WIDE = 65500  # a vocabulary of so many ids takes four bytes each, a smaller one two, as Megatron decides it
DOCUMENT_BYTES = 20  # of the index, where a document is one sequence: int32 length, int64 pointer, int64 start


@dataclass(frozen=True)
class Header:
    """code: of the id type. documents: one more than there are."""

    code: int
    sequences: int
    documents: int


def read(path: Path) -> Header:
    """Raises UserError where a file is no .idx of integer ids, or is not as long as its head says."""
    with path.open("rb") as file:
        head = file.read(START)
    if len(head) < START or not head.startswith(MAGIC):
        raise UserError(f"{path}: expected a Megatron .idx (it begins with MMIDIDX), found another kind of file.")
    version, code, sequences, documents = HEADER.unpack(head[len(MAGIC) :])
    if version != 1 or code not in CODES:
        raise UserError(
            f"{path}: expected version 1 with integer ids, found version {version} with type code {code}. "
            "Write the data set again with Megatron's preprocess_data.py."
        )
    expected, found = START + 12 * sequences + 8 * documents, path.stat().st_size
    if found != expected:
        remedy = "It has modes of a multimodal data set, which are not read." if found == expected + sequences else ""
        raise UserError(
            f"{path}: expected {expected:,} bytes for {sequences:,} sequences, found {found:,}. "
            + (remedy or "It is truncated: copy or write it again.")
        )
    return Header(code, sequences, documents)


def tokens(path: Path) -> int:
    """Of all its sequences. Raises UserError as `read`."""
    left, total = read(path).sequences, 0
    with path.open("rb") as file:
        file.seek(START)
        while left:
            lengths = array("i", file.read(4 * min(left, 1 << 20)))
            if sys.byteorder == "big":
                lengths.byteswap()
            total, left = total + sum(lengths), left - len(lengths)
    return total

"""Pieces of a source that a worker turns into documents: small enough to hold many in memory, large enough to send."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipelines.config import UserError
from pipelines.text import standard_library

CHUNK = 1 << 19  # input bytes of a chunk, about
LARGEST = 64 << 20  # bytes of one document: its tokenization takes some fifty times as much memory

Item = TypeVar("Item")


@dataclass(frozen=True)
class Chunk:
    """size: input bytes it stands for, for the progress bar. `documents` yields its texts and raises UserError."""

    size: int

    def documents(self) -> Iterator[str]:
        raise NotImplementedError


@dataclass(frozen=True)
class Texts(Chunk):
    texts: list[str]

    def documents(self) -> Iterator[str]:
        yield from self.texts


@dataclass(frozen=True)
class Files(Chunk):
    """Whole files of UTF-8 text, a document each."""

    paths: list[Path]

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            refuse_large(path.stat().st_size, str(path))
            yield decode(path.read_bytes(), str(path))


@dataclass(frozen=True)
class Modules(Chunk):
    """Source files of Python modules, a document each."""

    paths: list[Path]

    def documents(self) -> Iterator[str]:
        yield from map(standard_library.read, self.paths)


@dataclass(frozen=True)
class Cuts(Chunk):
    """Consecutive pieces of one UTF-8 file, cut at line ends; offset: the first one's place in the file, in bytes."""

    path: Path
    offset: int
    pieces: list[bytes]

    def documents(self) -> Iterator[str]:
        offset = self.offset
        for piece in self.pieces:
            yield decode(piece, str(self.path), offset)
            offset += len(piece)


@dataclass(frozen=True)
class Lines(Chunk):
    """Consecutive lines of a JSONL file; number: the first one's, from 1."""

    path: Path
    number: int
    lines: list[bytes]
    text_key: str

    def documents(self) -> Iterator[str]:
        for number, line in enumerate(self.lines, self.number):
            if line.strip():
                yield self._text(line, f"{self.path}, line {number}")

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: expected a JSON object, found an error at column {error.colno} ({error.msg}): "
                f"{line[:60].decode('utf-8', 'replace').strip()!r}. Repair or remove the line."
            ) from None
        except RecursionError:
            raise UserError(f"{where}: expected a flat JSON object, found one nested too deeply. Remove it.") from None
        if not isinstance(record, dict):
            raise UserError(
                f'{where}: expected a JSON object such as {{"{self.text_key}": "..."}}, '
                f"found a {type(record).__name__}."
            )
        if not isinstance(record.get(self.text_key), str):
            found = f"a {type(record[self.text_key]).__name__} there" if self.text_key in record else "none"
            raise UserError(
                f"{where}: expected a string under the key {self.text_key!r}, found {found}; "
                f"the line's keys: {', '.join(sorted(record)) or '(none)'}. Set text_key of this source."
            )
        text = record[self.text_key]
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(
                f"{where}: expected text, found half a surrogate pair, which is no character. "
                "Repair or remove the line."
            )
        return str(text)


def decode(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 bytes to text, without a byte order mark at the start."""
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8 text, found the byte 0x{data[error.start]:02x} at byte {offset + error.start:,}. "
            "Convert it (iconv -f latin1 -t utf-8), or name the text files alone with a pattern such as 'texts/*.txt'."
        ) from None


def refuse_large(size: int, where: str) -> None:
    if size > LARGEST:
        raise UserError(
            f"{where}: expected documents of at most {LARGEST:,} bytes, found {size:,} or more. "
            "Cut them; for a text file, document_bytes of its source does."
        )


def grouped(items: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, list[Item]]]:
    """Pairs (size, item) gathered into (total size, items) of about CHUNK bytes."""
    total = 0
    group: list[Item] = []
    for size, item in items:
        total += size
        group.append(item)
        if total >= CHUNK:
            yield total, group
            total, group = 0, []
    if group:
        yield total, group

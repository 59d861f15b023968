"""Where text comes from: JSONL, text files, parquet, a `datasets` directory, Python's standard library and packages.

A source knows its size in input bytes and yields chunks in a fixed order, so that the same input gives the same corpus.
"""

import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.config import SourceKind, UserError
from pipelines.text import package_descriptions, standard_library
from pipelines.text.chunks import CHUNK, LARGEST, Chunk, Cuts, Files, Lines, Modules, Texts, grouped, refuse_large

ENDINGS = {
    SourceKind.jsonl: (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
    SourceKind.text: (".txt", ".text", ".md", ".rst", ".py"),
    SourceKind.parquet: (".parquet",),
    SourceKind.megatron: (".bin", ".idx"),
}
ROWS = 256  # rows of a table read at a time


class Source:
    """kind: of SourceKind; name: for messages; size: input bytes, for the progress bar."""

    kind: SourceKind
    name: str
    size: int

    def chunks(self) -> Iterator[Chunk]:
        raise NotImplementedError

    def check(self) -> None:
        """Read the first documents, so that a wrong key or encoding is found before hours of work on other sources."""
        for chunk in self.chunks():
            if next(chunk.documents(), None) is not None:
                return
        raise UserError(f"{self.name}: expected text, found not a single document. Check the path.")


class JsonLines(Source):
    kind = SourceKind.jsonl

    def __init__(self, name: str, files: list[Path], text_key: str) -> None:
        self.name, self.files, self.text_key = name, files, text_key
        self.size = sum(file.stat().st_size for file in files)

    def chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            with path.open("rb") as raw:
                try:
                    yield from self._file(path, raw)
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise UserError(
                        f"{path}: expected a whole gzip file, found {error}. It is truncated or of another kind: "
                        "copy it again."
                    ) from None

    def _file(self, path: Path, raw: BinaryIO) -> Iterator[Chunk]:
        stream: Any = gzip.open(raw) if path.suffix == ".gz" else raw  # noqa: SIM115 closed with raw
        number, position = 1, 0
        while True:
            lines: list[bytes] = []
            length = 0
            while length < CHUNK and (line := stream.readline(LARGEST + 1)):
                refuse_large(len(line), f"{path}, line {number + len(lines)}")
                lines.append(line)
                length += len(line)
            if not lines:
                return
            yield Lines(raw.tell() - position, path, number, lines, self.text_key)
            number, position = number + len(lines), raw.tell()


class TextFiles(Source):
    """A document per file; with document_bytes, files are cut at the first blank line (after twice as much, the first
    line end) behind that many bytes."""

    kind = SourceKind.text

    def __init__(self, name: str, files: list[Path], document_bytes: int | None) -> None:
        self.name, self.files, self.document_bytes = name, files, document_bytes
        self.size = sum(file.stat().st_size for file in files)

    def chunks(self) -> Iterator[Chunk]:
        if self.document_bytes is None:
            for size, paths in grouped((path.stat().st_size, path) for path in self.files):
                yield Files(size, paths)
            return
        for path in self.files:
            offset = 0
            for size, pieces in grouped((len(piece), piece) for piece in self._pieces(path)):
                yield Cuts(size, path, offset, pieces)
                offset += size

    def _pieces(self, path: Path) -> Iterator[bytes]:
        assert self.document_bytes
        with path.open("rb") as file:
            piece = bytearray()
            while line := file.readline(LARGEST + 1):
                piece += line
                refuse_large(len(piece), str(path))
                enough = len(piece) >= self.document_bytes and not line.strip()
                if enough or len(piece) >= 2 * self.document_bytes:
                    yield bytes(piece)
                    piece.clear()
            if piece:
                yield bytes(piece)


class Library(Source):
    """Python's standard library."""

    kind = SourceKind.standard_library
    name = "standard_library"

    def __init__(self) -> None:
        self.files = standard_library.files()
        self.documentation = list(standard_library.documentation())
        self.size = sum(f.stat().st_size for f in self.files) + sum(len(t.encode()) for t in self.documentation)

    def chunks(self) -> Iterator[Chunk]:
        for size, paths in grouped((path.stat().st_size, path) for path in self.files):
            yield Modules(size, paths)
        for size, texts in grouped((len(text.encode()), text) for text in self.documentation):
            yield Texts(size, texts)


class Descriptions(Source):
    """The beginnings of the installed packages' descriptions."""

    kind = SourceKind.package_descriptions
    name = "package_descriptions"

    def __init__(self) -> None:
        self.texts = list(package_descriptions.documents())
        self.size = sum(len(text.encode()) for text in self.texts)

    def chunks(self) -> Iterator[Chunk]:
        for size, texts in grouped((len(text.encode()), text) for text in self.texts):
            yield Texts(size, texts)


class Parquet(Source):
    kind = SourceKind.parquet

    def __init__(self, name: str, files: list[Path], text_key: str) -> None:
        import pyarrow
        import pyarrow.parquet

        self.name, self.files, self.text_key = name, files, text_key
        self.size = sum(file.stat().st_size for file in files)
        for path in files:
            try:
                schema = pyarrow.parquet.read_schema(path)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(
                    f"{path}: expected a parquet file, found {str(error).rstrip('.')}. Copy it again, or set kind."
                ) from None
            _check_column(str(path), schema, text_key)

    def chunks(self) -> Iterator[Chunk]:
        import pyarrow.parquet

        for path in self.files:
            with pyarrow.parquet.ParquetFile(path) as file:
                per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
                batches = file.iter_batches(batch_size=ROWS, columns=[self.text_key])
                yield from _rows((batch.column(0).to_pylist() for batch in batches), per_row, str(path))


class DatasetDirectory(Source):
    """What `datasets.Dataset.save_to_disk` wrote."""

    kind = SourceKind.datasets

    def __init__(self, path: Path, text_key: str) -> None:
        import datasets

        if (path / "dataset_dict.json").is_file():
            splits = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise UserError(
                f"{path}: expected one data set, found a dictionary of {', '.join(splits)}. "
                f"Give one of them, e.g. {path / splits[0] if splits else path}; the corpus is split here."
            )
        try:
            data = datasets.load_from_disk(str(path))
        except Exception as error:
            raise UserError(
                f"{path}: expected what datasets' save_to_disk wrote, found {type(error).__name__}: "
                f"{str(error).rstrip('.')}. Save it again, or set kind of this source."
            ) from None
        _check_column(str(path), data.data.schema, text_key)
        self.name, self.text_key = str(path), text_key
        self.data = data.select_columns([text_key]).with_format("arrow")
        self.size = sum(file.stat().st_size for file in path.glob("*.arrow"))

    def chunks(self) -> Iterator[Chunk]:
        tables = (table.column(0).to_pylist() for table in self.data.iter(batch_size=ROWS))
        return _rows(tables, self.size / max(len(self.data), 1), self.name)


def _rows(batches: Iterator[list[str | None]], per_row: float, where: str) -> Iterator[Chunk]:
    """Chunks of a table's rows; a row without text is an empty document. per_row: input bytes."""
    for batch in batches:
        texts = [text or "" for text in batch]
        for _, group in grouped((len(text), text) for text in texts):
            refuse_large(max(map(len, group)), where)
            yield Texts(round(per_row * len(group)), group)


def _check_column(where: str, schema: Any, text_key: str) -> None:
    import pyarrow

    if text_key not in schema.names:
        raise UserError(
            f"{where}: expected a column {text_key!r}, found {', '.join(schema.names) or 'none'}. "
            "Set text_key of this source."
        )
    kind = schema.field(text_key).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(
            f"{where}: expected text in the column {text_key!r}, found {kind}. Set text_key of this source."
        )


def resolve_kind(path: str | None, kind: SourceKind) -> SourceKind:
    """What `kind: auto` means for a path: by the endings of its files. Raises UserError where they do not say."""
    if kind is not SourceKind.auto:
        return kind
    if path is None:
        return SourceKind.standard_library
    here = Path(path)
    if any((here / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return SourceKind.datasets
    if not here.is_dir() and here.with_name(here.name + ".idx").is_file():
        return SourceKind.megatron
    files = find_files(path)
    kinds = {next((k for k, endings in ENDINGS.items() if f.name.endswith(endings)), None) for f in files}
    found = kinds.pop()
    if found is None or kinds:
        seen = sorted({"".join(f.suffixes[-2:]) or f.name for f in files})
        raise UserError(
            f"{path}: expected files of one kind ({', '.join(e for es in ENDINGS.values() for e in es)}), "
            f"found {', '.join(seen[:8])}. Set kind of this source, or name the files with a pattern such as '*.txt'."
        )
    return found


def find_files(path: str, endings: tuple[str, ...] = ("",)) -> list[Path]:
    """The file at a path, or those of a directory (below it too, hidden ones left out) or pattern, in sorted order."""
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        every = [Path(top) / name for top, _, names in os.walk(here) for name in names]
        every = [f for f in every if not any(part.startswith(".") for part in f.relative_to(here).parts)]
        files = sorted((f for f in every if f.name.endswith(endings)), key=lambda f: f.relative_to(here).as_posix())
    else:
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file())
    if not files:
        exists = "a directory without any" if here.is_dir() else "nothing"
        kind = f" ({', '.join(endings)})" if endings != ("",) else ""
        raise UserError(
            f"{path}: expected a file, a directory or a pattern of files{kind}, found {exists}. Check the path."
        )
    return files


def open_source(path: str | None, kind: SourceKind, text_key: str, document_bytes: int | None) -> Source:
    """The source at a path; every kind but megatron, whose ids need no reading as text."""
    if document_bytes is not None and (kind is not SourceKind.text or document_bytes < 1):
        raise UserError(
            f"document_bytes: expected a number above 0 at a source of kind text, found {document_bytes} at {path} "
            f"of kind {kind.value}."
        )
    if kind in (SourceKind.standard_library, SourceKind.package_descriptions):
        if path is not None:
            raise UserError(f"kind={kind.value}: expected no path, found {path}. Leave path or kind out.")
        return Library() if kind is SourceKind.standard_library else Descriptions()
    if path is None:
        raise UserError(f"data.sources: expected a path for kind={kind.value}, found none.")
    if kind is SourceKind.datasets:
        if not Path(path).is_dir():
            raise UserError(f"{path}: expected a directory written by datasets' save_to_disk, found none there.")
        return DatasetDirectory(Path(path), text_key)
    if kind is SourceKind.jsonl:
        return JsonLines(path, find_files(path, ENDINGS[kind] if Path(path).is_dir() else ("",)), text_key)
    if kind is SourceKind.parquet:
        return Parquet(path, find_files(path, ENDINGS[kind] if Path(path).is_dir() else ("",)), text_key)
    assert kind is SourceKind.text, kind
    return TextFiles(path, find_files(path), document_bytes)


def short_name(number: int, path: str | None) -> str:
    """A file name for a source's part of the corpus: its number and what its path is called."""
    stem = re.sub(r"[^a-z0-9]+", "_", Path(path or "standard_library").name.lower()).strip("_")
    return f"{number:02d}_{stem[:40] or 'source'}"

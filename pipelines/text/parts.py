"""A corpus tokenized file by file, by many processes that need not know of each other, and put together at the end.

<directory>/<source>/<number of its file>/   <split>/<source>_<number>.{bin,idx} of one file, unigrams.npy, and last
                                             part.json: what it was made from and what it holds

A file's documents are encoded as `write_source` encodes them in a whole source, and a document's side of the split
depends on its content alone: the parts together are the corpus that one process makes, cut at the files' ends.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from pipelines.config import DataConfig, SourceConfig, SourceKind, UserError
from pipelines.files import link_or_copy, new_directory, read_object, write_json
from pipelines.text import indexed, sources
from pipelines.text.counts import Count, SourceCounts
from pipelines.text.encoding import Encoder
from pipelines.text.splitting import SPLITS
from pipelines.text.writing import Speed, write_source

KINDS = (SourceKind.jsonl, SourceKind.parquet)  # files of many documents each
MADE = "part.json"
Pieces = dict[str, dict[str, list[tuple[str, int]]]]  # {split: {source: [(name of a data set, tokens), ...]}}


@dataclass(frozen=True)
class File:
    """One file of a source. source, number: their places among the sources and among the source's files."""

    source: int
    number: int
    path: Path
    settings: SourceConfig
    kind: SourceKind

    @property
    def name(self) -> str:
        return f"{self.source_name}_{self.number:05d}"

    @property
    def source_name(self) -> str:
        return sources.short_name(self.source, self.settings.path)

    def directory(self, parts: Path) -> Path:
        return parts / self.source_name / f"{self.number:05d}"


def files_of(data: DataConfig) -> list[File]:
    """Every file of every source, in the order in which one process reads them. Raises UserError for sources that are
    not made of files with many documents each."""
    found = []
    for place, settings in enumerate(data.sources):
        kind = sources.resolve_kind(settings.path, settings.kind)
        if kind not in KINDS or settings.path is None or settings.limit_bytes is not None:
            what = f"kind {kind.value}" + ("" if settings.limit_bytes is None else " with limit_bytes")
            raise UserError(
                f"data.sources[{place}]: expected files of kind jsonl or parquet, without limit_bytes, to tokenize in "
                f"parts, found {what}. Leave data.parts out: one process makes the corpus of any source."
            )
        endings = sources.ENDINGS[kind] if Path(settings.path).is_dir() else ("",)
        paths = enumerate(sources.find_files(settings.path, endings))
        found += [File(place, number, path, settings, kind) for number, path in paths]
    return found


def share(files: list[File], part: int, parts: int) -> list[File]:
    """What part `part`, counted from 1, takes: the largest files first, each to the part that has least by then."""
    loads = [0] * parts
    taken: list[File] = []
    for file in sorted(files, key=lambda f: (-f.path.stat().st_size, f.source, f.number)):
        lightest = loads.index(min(loads))
        loads[lightest] += file.path.stat().st_size
        if lightest == part - 1:
            taken.append(file)
    return sorted(taken, key=lambda f: (f.source, f.number))


def origin(file: File, encoder: Encoder) -> dict[str, Any]:
    """What a part is made from: where it differs the file is tokenized again."""
    status = file.path.stat()
    return {
        "path": str(file.path),
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "text_key": file.settings.text_key,
        "fractions": [encoder.fractions.validation, encoder.fractions.test, encoder.fractions.calibration],
        "tokenizer": hashlib.sha256((encoder.directory / "tokenizer.json").read_bytes()).hexdigest(),
        "end_of_document": encoder.end_of_document,
    }


def is_made(file: File, parts: Path, encoder: Encoder) -> bool:
    made = file.directory(parts) / MADE
    return made.is_file() and read_object(made).get("origin") == origin(file, encoder)


def make(file: File, parts: Path, encoder: Encoder, vocabulary: int, workers: int, speed: Speed) -> None:
    """Tokenize one file; its directory appears whole."""
    unigrams = numpy.zeros(vocabulary, numpy.int64)
    counts = SourceCounts(file.name, str(file.path), file.kind.value, file.settings.weight, unigrams)
    text = sources.open_source(str(file.path), file.kind, file.settings.text_key, None)
    made_from = origin(file, encoder)
    with new_directory(file.directory(parts)) as building:
        write_source(text, encoder, counts, building, None, workers, speed)
        numpy.save(building / "unigrams.npy", counts.unigrams)
        splits = {split: vars(count) for split, count in counts.splits.items()}
        rest = {"empty_documents": counts.empty_documents, "byte_exact": counts.byte_exact}
        write_json(building / MADE, {"origin": made_from, "splits": splits, **rest})


def read(file: File, parts: Path) -> SourceCounts:
    """What a part holds."""
    made = read_object(file.directory(parts) / MADE)
    return SourceCounts(
        file.name,
        str(file.path),
        file.kind.value,
        file.settings.weight,
        numpy.load(file.directory(parts) / "unigrams.npy"),
        {split: Count(**made["splits"][split]) for split in SPLITS},
        made["empty_documents"],
        made["byte_exact"],
    )


def join(files: list[File], parts: Path, encoder: Encoder, building: Path) -> tuple[list[SourceCounts], Pieces]:
    """The data sets of all parts into <building>/<split>/, linked where the file system can, else copied. Returns the
    counts of each source as one process would have counted it, and the parts of each split: {split: {source name:
    [(name, tokens), ...]}}. Raises UserError where a part is missing or made from something else."""
    missing = [file for file in files if not is_made(file, parts, encoder)]
    if missing:
        listed = ", ".join(str(file.path) for file in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{parts}: expected every one of {len(files)} files tokenized as the settings say, found {len(missing)} "
            f"that are not: {listed}. Run stage=tokenize with data.part=1 to data.parts; what is done is not repeated."
        )
    by_source: dict[int, SourceCounts] = {}
    pieces: Pieces = {split: {} for split in SPLITS}
    for file, counts in ((file, read(file, parts)) for file in files):
        whole = by_source.get(file.source)
        if whole is None:
            unigrams = numpy.zeros_like(counts.unigrams)
            whole = SourceCounts(
                file.source_name, str(file.settings.path), file.kind.value, file.settings.weight, unigrams
            )
            by_source[file.source] = whole
        whole.unigrams += counts.unigrams
        whole.empty_documents += counts.empty_documents
        whole.byte_exact &= counts.byte_exact
        for split, count in counts.splits.items():
            whole.splits[split].add(count.documents, count.tokens, count.bytes)
            if count.documents:
                pieces[split].setdefault(whole.name, []).append((file.name, count.tokens))
                for source in _data_set(file, parts, split):
                    (building / split).mkdir(parents=True, exist_ok=True)
                    link_or_copy(source, building / split / source.name)
    return list(by_source.values()), pieces


def _data_set(file: File, parts: Path, split: str) -> Iterator[Path]:
    prefix = file.directory(parts) / split / file.name
    yield from (indexed.bin_path(prefix), indexed.idx_path(prefix))

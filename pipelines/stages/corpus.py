"""Text to a tokenizer and Megatron .bin/.idx files, split into train, validation, test and calibration. No torch.

Writes tokenizer/, data/<split>/<source>.{bin,idx}, token_bytes.npy (byte-level tokenizers), counts.json, and last
blend.json, which says where everything is. The same sources give the same bytes with any number of workers. With
data.parts the data sets are those of stage=tokenize, one for each file of the sources: the same documents on the same
sides of the split.
"""

import os
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from pipelines import console, families
from pipelines.artifacts import StageContext, stage_directory
from pipelines.config import Config, SourceConfig, SourceKind, TeacherMode, UserError
from pipelines.files import is_disk_error, new_directory, write_json
from pipelines.nemo_context import tokenizer_directories
from pipelines.text import indexed, parts, sources, tokenizer
from pipelines.text.counts import SourceCounts, summary
from pipelines.text.encoding import Encoder
from pipelines.text.existing import Scanner, prefix_of, split_existing
from pipelines.text.sources import Source
from pipelines.text.splitting import SPLITS, Fractions
from pipelines.text.tokenizer_files import has_tokenizer
from pipelines.text.writing import Speed, train_texts, write_source


@dataclass(frozen=True)
class Opened:
    """A source's settings with what they open: text, or the prefix of an existing Megatron data set."""

    settings: SourceConfig
    kind: SourceKind
    name: str
    text: Source | None
    prefix: Path | None

    @property
    def size(self) -> int:
        """Input bytes, as far as known beforehand."""
        if self.text is None:
            assert self.prefix
            index = indexed.read_index(self.prefix)
            return int(index.lengths.sum(dtype=numpy.int64)) * index.id_type.itemsize
        return min(self.text.size, self.settings.limit_bytes or self.text.size)


def run(context: StageContext) -> dict[str, Any]:
    """Make the corpus in context.directory. Returns documents, tokens and bytes per split, entropy and speed."""
    data, directory = context.config.data, context.directory
    started = time.monotonic()
    fractions = Fractions(data.validation_fraction, data.test_fraction, data.calibration_fraction)
    workers = data.workers if data.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise UserError(f"data.workers: expected 1 or more, found {workers}.")
    every = [] if data.parts else data.sources or [SourceConfig()]
    opened = [_open(number, settings) for number, settings in enumerate(every)]
    files = parts.files_of(data) if data.parts else []
    (directory / "blend.json").unlink(missing_ok=True)
    vocabulary = _make_tokenizer(context.config, opened, fractions, directory / "tokenizer")
    ids = indexed.id_type(vocabulary.size)
    encoder = Encoder(directory / "tokenizer", fractions, vocabulary.end_of_document, ids, vocabulary.token_bytes)
    pieces: parts.Pieces | None = None
    with new_directory(directory / "data") as building:
        if data.parts:
            counts, pieces = parts.join(files, stage_directory(context.config, "tokenize"), encoder, building)
        else:
            counts = _write(opened, vocabulary, encoder, workers, building)
        _refuse_empty(counts, fractions)
    content = summary(counts)
    table = vocabulary.token_bytes if all(source.byte_exact for source in counts) else None
    if table is not None:
        numpy.save(directory / "token_bytes.npy", table)
    else:
        (directory / "token_bytes.npy").unlink(missing_ok=True)
    write_json(directory / "counts.json", content)
    write_json(directory / "blend.json", _blend(counts, vocabulary, table is not None, pieces))
    seconds = time.monotonic() - started
    _say(content, vocabulary)
    splits = {split: {k: v for k, v in content["splits"][split].items() if k != "sources"} for split in SPLITS}
    return {
        "splits": splits,
        "unigram_entropy": content["unigram_entropy"],
        "vocab_size": vocabulary.size,
        "input_bytes_per_second": round(
            sum(source.size for source in opened) / seconds + sum(file.path.stat().st_size for file in files) / seconds
        ),
    }


def _open(number: int, settings: SourceConfig) -> Opened:
    if not settings.weight > 0:
        raise UserError(
            f"data.sources[{number}].weight: expected a number above 0, found {settings.weight}. "
            "Leave the source out to give it no share."
        )
    if settings.limit_bytes is not None and settings.limit_bytes < 1:
        raise UserError(f"data.sources[{number}].limit_bytes: expected a number above 0, found {settings.limit_bytes}.")
    kind = sources.resolve_kind(settings.path, settings.kind)
    name = sources.short_name(number, settings.path)
    if kind is not SourceKind.megatron:
        text = sources.open_source(settings.path, kind, settings.text_key, settings.document_bytes)
        text.check()
        return Opened(settings, kind, name, text, None)
    if settings.path is None or settings.limit_bytes is not None or settings.document_bytes is not None:
        raise UserError(
            f"data.sources[{number}] of kind megatron: expected a path, and neither limit_bytes nor document_bytes, "
            f"since its documents are made; found path={settings.path}, limit_bytes={settings.limit_bytes}, "
            f"document_bytes={settings.document_bytes}."
        )
    prefix = prefix_of(settings.path)
    if not indexed.read_index(prefix).document_count:
        raise UserError(f"{prefix}: expected documents, found none in its .idx. Check the path.")
    return Opened(settings, kind, name, None, prefix)


def _make_tokenizer(
    config: Config, opened: list[Opened], fractions: Fractions, directory: Path
) -> tokenizer.Vocabulary:
    """data.tokenizer, else the teacher's, else a BPE trained on the train split."""
    data, model = config.data, config.model
    given = Path(data.tokenizer) if data.tokenizer else _teachers_tokenizer(config)
    with new_directory(directory) as building:
        if given:
            tokenizer.take(given, building)
        else:
            size = data.tokenizer_vocab_size or model.shape.vocab_size
            _train_tokenizer(opened, fractions, data.tokenizer_sample_bytes, size, building)
        vocabulary = tokenizer.read_vocabulary(building)
        if config.teacher.mode is TeacherMode.pretrain or not model.path:
            embedding, where = model.shape.vocab_size, "model.shape"
        elif (Path(model.path) / "config.json").is_file():
            try:
                embedding, where = families.read_shape(model.path).vocab_size, model.path
            except ValueError as error:
                raise UserError(str(error)) from None
        else:  # a NeMo checkpoint: the teacher stage opens it and checks
            return vocabulary
        tokenizer.refuse_larger(vocabulary, str(given or "the tokenizer trained here"), embedding, where)
    return vocabulary


def _teachers_tokenizer(config: Config) -> Path | None:
    if config.teacher.mode is TeacherMode.pretrain or not config.model.path:
        return None
    teacher = Path(config.model.path)
    for directory in (teacher, *tokenizer_directories(teacher)):
        if has_tokenizer(directory):
            return directory
    raise UserError(
        f"{teacher}: expected the teacher's tokenizer (tokenizer.json) beside its weights, found none. "
        "Set data.tokenizer to its directory: a tokenizer trained here would not fit a trained teacher."
    )


def _train_tokenizer(
    opened: list[Opened], fractions: Fractions, sample_bytes: int, vocab_size: int, directory: Path
) -> None:
    ready = [source for source in opened if source.text is None]
    if ready:
        raise UserError(
            f"{ready[0].prefix}: expected the tokenizer that these ids were made with, found none. Set data.tokenizer."
        )
    weights = sum(source.settings.weight for source in opened)
    shares = [int(sample_bytes * source.settings.weight / weights) for source in opened]
    total = sum(min(source.size, share) for source, share in zip(opened, shares, strict=True))
    unit, scale = _unit(total)
    with console.progress("corpus  tokenizer", total / scale, unit) as bar:
        speed = Speed(bar, scale)
        texts = [
            train_texts(source.text, fractions, source.settings.limit_bytes, share, speed)
            for source, share in zip(opened, shares, strict=True)
            if source.text
        ]
        tokenizer.train(chain.from_iterable(texts), vocab_size, directory)


def _write(
    opened: list[Opened], vocabulary: tokenizer.Vocabulary, encoder: Encoder, workers: int, building: Path
) -> list[SourceCounts]:
    total = sum(source.size for source in opened)
    unit, scale = _unit(total)
    every = []
    with console.progress("corpus  tokens", total / scale, unit) as bar:
        speed = Speed(bar, scale)
        for source in opened:
            unigrams = numpy.zeros(vocabulary.size, numpy.int64)
            path = source.settings.path or source.kind.value
            counts = SourceCounts(source.name, path, source.kind.value, source.settings.weight, unigrams)
            every.append(counts)
            try:
                if source.text:
                    write_source(source.text, encoder, counts, building, source.settings.limit_bytes, workers, speed)
                    continue
                assert source.prefix
                scanner = Scanner(source.prefix, encoder.directory, vocabulary, encoder.fractions)
                if not split_existing(scanner, counts, building, workers, speed):
                    console.say(
                        f"warning: {source.prefix}: no document ends with the end-of-document token "
                        f"{vocabulary.end_of_document}, so nothing will separate its documents in training."
                    )
            except OSError as error:
                if is_disk_error(error):
                    raise _disk_full(error, building, speed.done / max(total, 1)) from error
                raise
    return every


def _disk_full(error: OSError, building: Path, share: float) -> UserError:
    written = sum(file.stat().st_size for file in building.rglob("*") if not file.is_symlink() and file.is_file())
    expected = f"about {int(written / share):,} bytes" if share > 0 else "room"
    return UserError(
        f"{error.filename or building}: {error.strerror}: expected {expected} for the corpus, found no more after "
        f"{written:,}. Free some space or set run.directory to a larger disk, and start again; what was half-written "
        "is removed, earlier stages' outputs are untouched."
    )


def _refuse_empty(counts: list[SourceCounts], fractions: Fractions) -> None:
    total = sum(source.documents for source in counts)
    if not total:
        raise UserError("data.sources: expected text, found only empty documents. Check the paths and text_key.")
    shares = {"validation": fractions.validation, "test": fractions.test, "calibration": fractions.calibration}
    for split in SPLITS:
        wanted = split == "train" or shares[split] > 0
        if not wanted or any(source.splits[split].documents for source in counts):
            continue
        enough = 4 / total  # leaves a split empty once in fifty times
        remedy = f"Set data.{split}_fraction={enough:.2g}, give" if enough <= 0.25 else "Give"
        if split == "train":
            remedy = "Lower the other splits' fractions, give"
        noun = "document" if total == 1 else "documents"
        raise UserError(
            f"corpus: expected documents in the {split} split, found none: {total} {noun} in all, of which "
            f"data.{split}_fraction={shares.get(split, 1 - sum(shares.values())):g} should stand there. {remedy} "
            "more documents, or cut long text files with document_bytes of their source."
        )


def _blend(
    counts: list[SourceCounts], vocabulary: tokenizer.Vocabulary, exact: bool, pieces: parts.Pieces | None
) -> dict[str, Any]:
    """Paths relative to the corpus; weights sum to 1 in each split over the sources that have documents there. pieces:
    the data sets of each source where it has several; they share its weight by their tokens."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        present = [source for source in counts if source.splits[split].documents]
        weights = sum(source.weight for source in present)
        splits[split] = [
            {"prefix": f"data/{split}/{name}", "weight": s.weight / weights * tokens / s.splits[split].tokens}
            for s in present
            for name, tokens in (pieces[split][s.name] if pieces else [(s.name, s.splits[split].tokens)])
        ]
    return {
        "splits": splits,
        "vocab_size": vocabulary.size,
        "eod": vocabulary.end_of_document,
        "tokenizer": "tokenizer",
        "token_bytes": "token_bytes.npy" if exact else None,
    }


def _say(content: dict[str, Any], vocabulary: tokenizer.Vocabulary) -> None:
    for split in SPLITS:
        count = content["splits"][split]
        if count["documents"]:
            console.say(
                f"corpus  {split:<12}{count['documents']:>10,} documents {count['tokens']:>14,} tokens "
                f"{count['bytes']:>15,} bytes  {count['bytes_per_token']:.2f} bytes/token"
            )
    console.say(
        f"corpus  {vocabulary.size:,} ids, unigram entropy of train {content['unigram_entropy']:.3f} nats/token"
    )


def _unit(total_bytes: float) -> tuple[str, int]:
    return ("MB", 1_000_000) if total_bytes >= 10_000_000 else ("kB", 1_000)

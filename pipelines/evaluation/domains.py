"""Text of other domains than the corpus: the user's own and what the models were not trained for, side by side."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from pipelines import artifacts
from pipelines.config import Config, SourceKind, UserError, document_mask
from pipelines.evaluation.comparison import compared, document_groups, entries
from pipelines.evaluation.sharded import Sharded
from pipelines.evaluation_settings import DomainConfig
from pipelines.model.parallel import on_first_rank
from pipelines.model.windows import Windows, token_bytes
from pipelines.text import indexed, sources
from pipelines.text.encoding import Encoded, Encoder
from pipelines.text.splitting import Fractions
from pipelines.text.tokenizer import read_vocabulary

DIRECTORY = "domains"  # of the stage's directory: their tokens


def settings_of(config: Config, domain: DomainConfig) -> dict[str, Any]:
    """What decides a domain's part beside models and corpus. Every rank calls it."""
    evaluate = config.evaluate
    return vars(domain) | {
        "content": on_first_rank(lambda: _content(config, domain)),
        "sequence_length": evaluate.sequence_length,
        "precision": evaluate.precision or config.distil.precision,
        "document_mask": document_mask(config, "evaluate"),
    }


def measure(config: Config, domain: DomainConfig, sharded: Sharded, directory: Path) -> dict[str, Any]:
    """A domain's entry in results.json (stages/evaluate.py has its form). directory: gets its tokens, domains/<name>.*.

    Every rank calls it. Raises UserError on every rank where the text cannot be read, or holds nothing.
    """
    prefix = directory / DIRECTORY / domain.name
    written = on_first_rank(lambda: _write(domain, sharded.corpus, prefix))
    end = written["end_of_document"] if document_mask(config, "evaluate") else None
    windows = Windows([prefix], config.evaluate.sequence_length, end)
    table = numpy.full(sharded.vocab_size, written["bytes"] / written["tokens"])
    if (exact := token_bytes(sharded.corpus)) is not None:
        table = numpy.zeros(max(sharded.vocab_size, len(exact)))
        table[: len(exact)] = exact.numpy()
    found = sharded.measure(windows, table, domain.name, config.evaluate.micro_batch_size)
    intervals, differences, documents = compared(found)
    return {
        "path": domain.path or domain.source.value,
        "kind": domain.kind.value,
        "tokens": found["teacher"].tokens,
        "bytes": round(found["teacher"].text_bytes or 0),
        "documents": documents,
        "models": entries(found, intervals),
        "differences": differences,
        "document_groups": document_groups(found),
    }


def _content(config: Config, domain: DomainConfig) -> Any:
    """Hashes of the files; of the text itself where there are none to name."""
    if domain.path is None:
        digest = hashlib.sha256()
        for text in _source(domain).chunks():
            digest.update("\0".join(text.documents()).encode())
        return digest.hexdigest()
    paths = artifacts.source_paths(domain.path)
    return {str(path): artifacts.fingerprint(path, artifacts.sidecar_directory(config)) for path in paths}


def _source(domain: DomainConfig) -> sources.Source:
    kind = sources.resolve_kind(domain.path, domain.source)
    if kind is SourceKind.megatron:
        raise UserError(f"{domain.path}: expected text for the domain {domain.name}, found token ids. Give the text.")
    return sources.open_source(domain.path, kind, domain.text_key, domain.document_bytes)


def _write(domain: DomainConfig, corpus: Path, prefix: Path) -> dict[str, Any]:
    """The domain's tokens as a Megatron data set; {"tokens", "bytes", "end_of_document"}. In one process."""
    vocabulary = read_vocabulary(corpus / "tokenizer")
    ids, nowhere = indexed.id_type(vocabulary.size), Fractions(0.0, 0.0, 0.0)
    encoder = Encoder(corpus / "tokenizer", nowhere, vocabulary.end_of_document, ids, vocabulary.token_bytes)
    writer = indexed.Writer(prefix, ids)
    text_bytes = 0.0
    try:
        for encoded in _encoded(domain, encoder):
            room = domain.tokens - writer.tokens
            ends = numpy.cumsum(encoded.lengths)
            whole = int(numpy.searchsorted(ends, room, side="right"))
            lengths = encoded.lengths[:whole]
            text_bytes += float(encoded.text_bytes[:whole].sum())
            if whole < len(ends) and (rest := room - int(lengths.sum())) > 0:  # the beginning of the next document
                text_bytes += float(encoded.text_bytes[whole]) * rest / float(encoded.lengths[whole])
                lengths = numpy.append(lengths, rest).astype(encoded.lengths.dtype)
            writer.add(encoded.ids[: int(lengths.sum())], lengths)
            if writer.tokens >= domain.tokens:
                break
        writer.finish()
    finally:
        writer.abandon()
    if writer.tokens < 2:
        where = domain.path or domain.source.value
        raise UserError(f"{where}: expected text for the domain {domain.name}, found none. Give a file that has some.")
    return {"tokens": writer.tokens, "bytes": text_bytes, "end_of_document": vocabulary.end_of_document}


def _encoded(domain: DomainConfig, encoder: Encoder) -> Iterator[Encoded]:
    for chunk in _source(domain).chunks():
        yield encoder(chunk)

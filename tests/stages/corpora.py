"""Makes small corpora with the corpus stage and reads them back."""

import json
from pathlib import Path
from typing import Any

import numpy

from pipelines.artifacts import StageContext
from pipelines.config import Config, SourceConfig
from pipelines.stages import corpus
from pipelines.text import indexed

FRACTIONS = {"validation_fraction": 0.1, "test_fraction": 0.1, "calibration_fraction": 0.1}


def make(directory: Path, inputs: list[SourceConfig], vocab_size: int = 600, **data: Any) -> dict[str, Any]:
    config = Config()
    config.model.shape.vocab_size = vocab_size
    config.data.sources = inputs
    for key, value in ({"workers": 1} | FRACTIONS | data).items():
        setattr(config.data, key, value)
    directory.mkdir(parents=True, exist_ok=True)
    return corpus.run(StageContext(config, "corpus", directory))


def read(directory: Path, split: str, number: int = 0) -> list[list[int]]:
    """The ids of every document of one prefix of a split."""
    blend = json.loads((directory / "blend.json").read_text())
    prefix = directory / blend["splits"][split][number]["prefix"]
    index = indexed.read_index(prefix)
    ids, size = indexed.read_ids(prefix, index), index.id_type.itemsize
    return [ids[p // size : p // size + n].tolist() for p, n in zip(index.pointers, index.lengths, strict=True)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def existing(prefix: Path, ids: list[list[int]], kind: Any = numpy.int32) -> str:
    writer = indexed.Writer(prefix, numpy.dtype(kind))
    for document in ids:
        writer.add(numpy.array(document), numpy.array([len(document)], numpy.int32))
    writer.finish()
    return str(prefix)

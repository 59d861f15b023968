"""Existing Megatron data sets under a tokenizer that is not byte-level, and the pieces that workers take."""

import json
from pathlib import Path

import numpy
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipelines.text import existing, indexed, tokenizer
from pipelines.text.splitting import Fractions


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Whole words, their spaces as U+2581: an id's bytes depend on where it stands."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", "▁über", "▁the", "▁sea"])}
    opened = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    opened.pre_tokenizer, opened.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    opened.add_special_tokens(["</s>"])
    (tmp_path / "words").mkdir()
    opened.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return tmp_path / "words"


def write(prefix: Path, documents: list[list[int]], kind: type) -> Path:
    writer = indexed.Writer(prefix, numpy.dtype(kind))
    for ids in documents:
        writer.add(numpy.array(ids), numpy.array([len(ids)], numpy.int32))
    writer.finish()
    return prefix


def test_without_bytes_per_id(tmp_path, words):
    rng = numpy.random.default_rng(0)
    documents = [rng.integers(2, 5, size=20).tolist() for _ in range(50)]
    fractions, vocabulary = Fractions(0.2, 0.2, 0.2), tokenizer.read_vocabulary(words)
    assert vocabulary.pieces is None
    narrow = write(tmp_path / "narrow", documents, numpy.uint16)
    wide = write(tmp_path / "wide", [[*ids, 1] for ids in documents], numpy.int32)
    found = [existing.Scanner(prefix, words, vocabulary, fractions)((0, 50)) for prefix in (narrow, wide)]
    assert found[0].sides.tolist() == found[1].sides.tolist() and len(set(found[0].sides)) == 4
    assert [part.ended for part in found] == [0, 50]
    text = ["", "", " über", " the", " sea"]
    expected = sum(len("".join(text[n] for n in ids).lstrip().encode()) for ids in documents)
    assert found[0].bytes.sum() == found[1].bytes.sum() == expected
    assert found[1].tokens.sum() == 50 * 21
    assert found[0].unigrams.sum() == found[0].tokens[0] and found[1].unigrams[1] == (found[1].sides == 0).sum()


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("tokens", [1, 50, 10_000])
def test_the_pieces_cover_every_document_once(tmp_path, monkeypatch, block, tokens):
    monkeypatch.setattr(indexed, "BLOCK", block)
    monkeypatch.setattr(existing, "TOKENS", tokens)
    lengths = numpy.random.default_rng(1).integers(1, 30, size=100)
    index = indexed.read_index(write(tmp_path / "d", [[0] * n for n in lengths], numpy.uint16))
    pieces = list(existing._pieces(index))
    assert [n for start, stop in pieces for n in range(start, stop)] == list(range(100))
    for start, stop in pieces:  # one document less is too little, but at the end of a block
        assert lengths[start : stop - 1].sum() < tokens
        assert lengths[start:stop].sum() >= tokens or stop % block == 0 or stop == 100

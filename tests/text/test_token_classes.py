"""Classes of tokens, of a byte-level BPE and of a tokenizer in sentencepiece's manner."""

import json
from pathlib import Path

import numpy
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from pipelines.text.token_classes import CLASSES, NO_CLASS, read_token_classes

SAME = {"ing": 1, "(self": 2, "12": 3, "):": 8, "'t": 10}
PIECES = {
    "byte-level": SAME | {"Ġthe": 0, "Ġ7": 4, "Ċ": 5, "ĠĠ": 6, "Ġ(": 7, "æ": 9},
    "sentencepiece": SAME | {"▁the": 0, "▁7": 4, "\n": 5, "▁▁": 6, "▁(": 7, "<0xE6>": 9},
}


@pytest.fixture(params=PIECES)
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    tokenizer = Tokenizer(models.BPE(PIECES[request.param], []))
    tokenizer.decoder = decoders.ByteLevel() if request.param == "byte-level" else decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return tmp_path


def test_classes_by_piece_and_by_what_stands_before(directory: Path) -> None:
    classes = read_token_classes(directory)
    line = [11, 1, 1, 0, 1, 10, 2, 3, 1, 4, 5, 1, 6, 7, 8, 10, 9]  # each after the one before it
    names = ["word_start", "word_inside", "word_start", "word_inside", "word_inside", "word_start", "number"]
    names += ["word_start", "number", "white_space", "word_start", "white_space", "punctuation", "punctuation"]
    found = classes.of(numpy.array(line[:-1]), numpy.array(line[1:]))
    assert [CLASSES[number] for number in found] == [*names, "word_start", "other"]
    assert classes.of(numpy.array([0]), numpy.array([11])).tolist() == [NO_CLASS]

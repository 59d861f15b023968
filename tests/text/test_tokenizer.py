"""The trained tokenizer, given ones, and those that are refused."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipelines.config import UserError
from pipelines.text import tokenizer


def test_trained_opens_in_transformers_and_loses_nothing(trained, documents):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(str(trained))
    assert opened.eos_token == "<|end_of_text|>" and opened.bos_token == "<|begin_of_text|>"
    vocabulary = tokenizer.read_vocabulary(trained)
    assert vocabulary.size == 600 == len(opened) and vocabulary.end_of_document == opened.eos_token_id
    for text in [*documents[:20], "\t x  = 'tab'\r\n\r\n  \N{SNOWMAN}\x00 12345"]:
        ids = opened(text)["input_ids"]
        assert opened.decode(ids) == text
        assert ids == tokenizer.load(trained).encode(text, add_special_tokens=False).ids
        assert vocabulary.token_bytes[ids].sum() == len(text.encode())


def test_training_depends_on_the_texts_alone(tmp_path, trained, documents):
    tokenizer.train(iter(documents[::-1]), 600, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_a_users_error_in_the_texts_arrives_whole(tmp_path):
    def texts():
        yield "fine"
        raise UserError("line 3 is bad")

    with pytest.raises(UserError, match="^line 3 is bad$"):
        tokenizer.train(texts(), 300, tmp_path / "t")
    with pytest.raises(UserError, match="at least 258"):
        tokenizer.train(iter(["fine"]), 257, tmp_path / "t")


def test_names_of_special_tokens_in_text_are_text(trained):
    ids = tokenizer.load(trained).encode("a<|end_of_text|>b", add_special_tokens=False).ids
    assert tokenizer.read_vocabulary(trained).end_of_document not in ids


def test_truncation_and_templates_of_a_given_tokenizer_are_not_applied(tmp_path, trained, documents):
    given = Tokenizer.from_file(str(trained / "tokenizer.json"))
    given.enable_truncation(3)
    given.enable_padding(length=100)
    shutil.copytree(trained, tmp_path / "given")
    given.save(str(tmp_path / "given" / "tokenizer.json"))
    tokenizer.take(tmp_path / "given", tmp_path / "taken")
    expected = tokenizer.load(trained).encode(documents[0]).ids
    assert tokenizer.load(tmp_path / "taken").encode(documents[0], add_special_tokens=False).ids == expected
    assert len(expected) > 3


def test_bytes_per_id_only_where_they_are_known(tmp_path):
    pieces = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    pieces.normalizer, pieces.decoder = normalizers.NFC(), decoders.Metaspace()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    tmp_path.joinpath("tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    pieces.save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer.read_vocabulary(tmp_path)
    assert vocabulary.token_bytes is None and vocabulary.end_of_document == 1 and vocabulary.size == 2


def test_refusals(tmp_path, trained):
    with pytest.raises(UserError, match="found no directory"):
        tokenizer.take(tmp_path / "none", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found a directory without tokenizer files"):
        tokenizer.take(tmp_path / "empty", tmp_path / "t")
    with pytest.raises(UserError, match="at most 512 ids.*of teacher.*found 600"):
        tokenizer.refuse_larger(tokenizer.read_vocabulary(trained), "t", 512, "teacher")
    tokenizer.refuse_larger(tokenizer.read_vocabulary(trained), "t", 600, "teacher")
    shutil.copytree(trained, tmp_path / "given")
    (tmp_path / "given" / "special_tokens_map.json").unlink()
    settings = tmp_path / "given" / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(UserError, match="expected an eos_token of the vocabulary, found '<none>'"):
        tokenizer.read_vocabulary(tmp_path / "given")
    settings.write_text("{}")
    with pytest.raises(UserError, match="found no eos_token"):
        tokenizer.read_vocabulary(tmp_path / "given")
    settings.write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        tokenizer.read_vocabulary(tmp_path / "given")
    (tmp_path / "given" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="expected a tokenizer, found"):
        tokenizer.load(tmp_path / "given")


def test_a_tokenizer_without_tokenizer_json_is_converted(tmp_path):
    """vocab.json and merges.txt alone, as GPT-2 came."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*characters, "ab", "<|endoftext|>"])}
    source = tmp_path / "slow"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    tokenizer.take(source, tmp_path / "taken")
    assert tokenizer.load(tmp_path / "taken").encode("abc").ids == [256, vocabulary["c"]]
    assert tokenizer.read_vocabulary(tmp_path / "taken").end_of_document == 257

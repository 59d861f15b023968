"""The corpus's tokenizer: a given Hugging Face directory, or a byte-level BPE trained on the train split. No torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.config import UserError
from pipelines.files import write_json
from pipelines.text.tokenizer_files import copy_tokenizer, has_tokenizer, special_token

BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"
# Llama 3's: contractions, words with the sign or space before them, numbers of up to three digits, signs, line ends.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """size: the largest id + 1. end_of_document: the id after each document. pieces: the UTF-8 bytes that each id
    stands for, none for special tokens; None for a tokenizer that is not byte-level."""

    size: int
    end_of_document: int
    pieces: list[bytes] | None

    @cached_property
    def token_bytes(self) -> numpy.ndarray[Any, Any] | None:
        """(size,) int32: the lengths of the pieces."""
        return None if self.pieces is None else numpy.array([len(piece) for piece in self.pieces], numpy.int32)

    def text(self, ids: numpy.ndarray[Any, Any]) -> bytes:
        """The text of a byte-level tokenizer's ids."""
        assert self.pieces is not None
        return b"".join([self.pieces[number] for number in ids.tolist()])


def load(directory: Path) -> Tokenizer:
    """tokenizer.json for running text: whole documents, nothing added, special tokens' names as plain text."""
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:
        raise UserError(
            f"{directory / 'tokenizer.json'}: expected a tokenizer, found {error}. Copy it again."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_vocabulary(directory: Path) -> Vocabulary:
    tokenizer = load(directory)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    end_of_document = _end_of_document(directory, tokenizer)
    pieces = _pieces(tokenizer, size)
    if pieces is not None:
        pieces[end_of_document] = b""
    return Vocabulary(size, end_of_document, pieces)


def take(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files into a new directory; one without tokenizer.json is converted by transformers."""
    if not source.is_dir() or not has_tokenizer(source):
        found = "a directory without tokenizer files" if source.is_dir() else "no directory"
        raise UserError(
            f"{source}: expected a Hugging Face tokenizer directory (tokenizer.json, tokenizer_config.json), "
            f"found {found}. Set data.tokenizer."
        )
    directory.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(source, directory)
    if (source / "tokenizer.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(str(source), use_fast=True, local_files_only=True)
        fast.save_pretrained(str(directory))
    except Exception as error:
        raise UserError(f"{source}: expected a tokenizer that transformers can open, found: {error}.") from None
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"{source}: expected a tokenizer with a tokenizer.json, found a {type(fast).__name__} that has none and "
            "cannot be converted. Give another with data.tokenizer."
        )


def refuse_larger(vocabulary: Vocabulary, source: str, embedding: int, model: str) -> None:
    """A tokenizer must not have ids that the model's embedding has no row for."""
    if vocabulary.size > embedding:
        raise UserError(
            f"{source}: expected a tokenizer of at most {embedding:,} ids, the vocab_size of {model}; "
            f"found {vocabulary.size:,}. Give the model's own tokenizer with data.tokenizer, or a model with a larger "
            "vocab_size."
        )


def train(texts: Iterator[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE of at most vocab_size ids and write it as a Hugging Face directory.

    The result depends on the texts alone, not on their order or the number of threads.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise UserError(
            f"data.tokenizer_vocab_size: expected at least {len(alphabet) + 2} (256 bytes and two special tokens), "
            f"found {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    special = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(directory / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # Llama's generate refuses token_type_ids
    }
    write_json(directory / "tokenizer_config.json", settings | special)


def _end_of_document(directory: Path, tokenizer: Tokenizer) -> int:
    """The id of eos_token."""
    found = special_token(directory, "eos_token")
    if found is None:
        raise UserError(
            f"{directory}: expected a tokenizer with an end-of-document token, found no eos_token in "
            'tokenizer_config.json or special_tokens_map.json. Add it there, e.g. "eos_token": "<|end_of_text|>".'
        )
    token, file = found
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"{file}: expected an eos_token of the vocabulary, found {token!r}.")
    return int(number)


def _pieces(tokenizer: Tokenizer, size: int) -> list[bytes] | None:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if "ByteLevel" not in [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))]:
        return None
    # The byte-level alphabet (GPT-2's): printable Latin-1 stands for itself, the other bytes for U+0100 and on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    pieces = [b""] * size
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if all(character in byte_of for character in token):
            pieces[number] = bytes(byte_of[character] for character in token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        pieces[number] = b"" if added.special else added.content.encode()
    return pieces

"""What kind of text a token is, told from the tokenizer's pieces: byte-level BPE and sentencepiece alike. No torch.

A piece with a letter is of a word: it starts one where something else than a letter stands before its first letter
(a space, a sign), or where the token before it does not end with a letter; else it goes on inside of one. A piece that
begins with an apostrophe is read as one that begins with a letter, so that the 't of don't is inside. Without letters:
`number` with a digit, `white_space` of nothing but blanks and line ends, `punctuation` of signs and symbols (with or
without blanks), and `other`: parts of a character, control characters. Special tokens have no class.
"""

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from pipelines.evaluation_settings import TOKEN_CLASSES
from pipelines.text import tokenizer

CLASSES = TOKEN_CLASSES
WORD_START, WORD_INSIDE, NUMBER, PUNCTUATION, WHITE_SPACE, OTHER = range(len(CLASSES))
NO_CLASS = len(CLASSES)

Array = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class TokenClasses:
    """(vocabulary,) each. alone: place in CLASSES of a token that follows no letter, NO_CLASS of a special one; bare:
    whether it begins with a letter (or an apostrophe); ends: whether it ends with one."""

    alone: Array
    bare: Array
    ends: Array

    def of(self, before: Array, tokens: Array) -> Array:
        """The classes of tokens by the tokens before them; all of one shape, int64 ids."""
        inside = self.bare[tokens] & self.ends[before]
        return numpy.where(inside, WORD_INSIDE, self.alone[tokens])


def read_token_classes(directory: Path) -> TokenClasses:
    """Of a tokenizer's directory with a tokenizer.json. Raises UserError where it cannot be read."""
    texts = _texts(directory)
    alone = [NO_CLASS if text is None else _class(text) for text in texts]
    words = [text if text and kind == WORD_START else "" for text, kind in zip(texts, alone, strict=True)]
    return TokenClasses(
        numpy.array(alone, numpy.int64),
        numpy.array([bool(text) and (_is_letter(text[0]) or text[0] in "'’") for text in words]),
        numpy.array([bool(text) and _is_letter(text[-1]) for text in words]),
    )


def _texts(directory: Path) -> list[str | None]:
    """The text of each id, U+FFFD for what is no whole character; None for special tokens and ids without a piece."""
    pieces = tokenizer.read_vocabulary(directory).pieces
    if pieces is not None:
        return [piece.decode(errors="replace") if piece else None for piece in pieces]
    opened = tokenizer.load(directory)
    vocabulary = opened.get_vocab(with_added_tokens=True)
    texts: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for piece, number in vocabulary.items():
        byte = piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6  # sentencepiece's lone bytes
        texts[number] = bytes([int(piece[3:5], 16)]).decode(errors="replace") if byte else piece.replace("▁", " ")
    for number, added in opened.get_added_tokens_decoder().items():
        texts[number] = None if added.special else added.content
    return texts


def _class(text: str) -> int:
    """Of a token that follows no letter."""
    if any(_is_letter(character) for character in text):
        return WORD_START
    if any(unicodedata.category(character).startswith("N") for character in text):
        return NUMBER
    if not text.strip():
        return WHITE_SPACE
    signs = all(c.isspace() or unicodedata.category(c)[0] in "PS" for c in text) and "\ufffd" not in text
    return PUNCTUATION if signs else OTHER


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"

"""Which ids a tokenizer and a corpus have, against the rows of a model's embedding. Imports no torch."""

from pathlib import Path
from typing import Any

from pipelines.config import UserError, expect
from pipelines.files import read_object

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them makes a directory a tokenizer's


def token_ids(directory: Path, added: bool = True) -> dict[str, int]:
    """{token: id} of tokenizer.json, with its added tokens or without them; empty where there is no such file.

    Raises UserError where it is not a tokenizer's.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}
    remedy = "Fetch it again."
    content = read_object(path, remedy)
    model = content.get("model")
    tokens: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(tokens, list):  # a unigram model's pieces with their scores, in the order of the ids
        pieces = [entry[0] if isinstance(entry, list) and entry else entry for entry in tokens]
        tokens = {str(token): number for number, token in enumerate(pieces)}
    good = isinstance(tokens, dict) and all(type(number) is int for number in tokens.values())
    expect(good, str(path), "a tokenizer with a model and its vocab", "none", remedy)
    more = content.get("added_tokens") or []
    good = isinstance(more, list) and all(isinstance(token, dict) and type(token.get("id")) is int for token in more)
    expect(good, f"{path}: added_tokens", "tokens with an id each", "others", remedy)
    return dict(tokens) | ({str(token.get("content", token["id"])): token["id"] for token in more} if added else {})


def tokenizer_size(directory: Path) -> int | None:
    """One more than the largest id in tokenizer.json; None where there is no such file."""
    return max(token_ids(directory).values(), default=-1) + 1 or None


def read_blend(corpus: Path) -> dict[str, Any]:
    """blend.json of a corpus: its splits, vocabulary and tokenizer. Raises UserError where it is none."""
    path = corpus / "blend.json"
    if not path.is_file():
        raise UserError(f"{corpus}: expected a corpus with a blend.json, found none. Run stage=corpus first.")
    blend = read_object(path, "Make the corpus again.")
    good = isinstance(blend.get("splits"), dict)
    expect(good, str(path), "the splits of a corpus", "none", "Make the corpus again with stage=corpus.")
    return blend


class OtherVocabulary(UserError):
    """A corpus and a model that can both be read, of two vocabularies."""


def check_vocabulary(corpus: Path, model: Path, vocab_size: int) -> None:
    """Raises OtherVocabulary where the corpus was tokenized with another vocabulary than that of the model in a
    directory, UserError where one of them cannot be read."""
    found: Any = read_blend(corpus).get("vocab_size")
    remedy = "Make the corpus again with stage=corpus."
    expect(isinstance(found, int), str(corpus / "blend.json"), "a vocab_size", found, remedy)
    if found > vocab_size:
        raise OtherVocabulary(
            f"{corpus}: expected a tokenizer of at most the {vocab_size} ids of the model {model}, found {found}. "
            "Make the corpus with the model's own tokenizer (data.tokenizer), or take a model with more ids."
        )
    ours, theirs = (token_ids(path, added=False) for path in (corpus / "tokenizer", model))
    if ours and theirs and ours != theirs:
        raise OtherVocabulary(
            f"{corpus}: expected the model's vocabulary of {len(theirs)} tokens, found another one of {len(ours)}. "
            f"Make the corpus with the model's tokenizer: data.tokenizer={model}."
        )

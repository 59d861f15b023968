"""A Hugging Face tokenizer's directory as plain files: which belong to it, and the ids that they name. No libraries."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.config import UserError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has at least one of these
FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, directory: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def token_ids(directory: Path) -> dict[str, int]:
    """{token: id} of tokenizer.json with its added tokens; empty where there is no such file."""
    content = read_object(directory / "tokenizer.json")
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if not isinstance(vocabulary, dict):  # a unigram model's pieces with their scores, in the order of the ids
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def special_token(directory: Path, name: str) -> tuple[str, Path] | None:
    """(token, file) of "eos_token" and the like, by tokenizer_config.json or else special_tokens_map.json."""
    for file in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        token = read_object(file).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return token, file
    return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found an error: {error}. Copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}. Copy it again.")
    return content

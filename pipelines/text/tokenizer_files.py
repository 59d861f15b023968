"""A Hugging Face tokenizer's directory as plain files: which belong to it, and its special tokens. No libraries."""

import shutil
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.vocabulary import TOKENIZERS

FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZERS)


def copy_tokenizer(source: Path, directory: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


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
    return files.read_object(path) if path.is_file() else {}

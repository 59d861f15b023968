"""What stands beside the weights of a Hugging Face directory: its two configurations and the tokenizer's files."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipelines.config import UserError
from pipelines.families import ModelShape

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_hub_files(
    directory: Path, shape: ModelShape, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> None:
    """Write config.json and generation_config.json for weights of `dtype`, and copy the tokenizer's files.

    tokenizer: a directory with a tokenizer, of a model or alone. The ids of its special tokens come from its own
    config.json and generation_config.json where it has them, else from its tokenizer files; they are null where
    unknown, since transformers would assume Llama 2's. Raises UserError where there is no tokenizer.
    """
    ids: dict[str, Any] = dict.fromkeys(_SPECIAL_IDS)
    generation: dict[str, Any] = {}
    if tokenizer is not None:
        source = Path(tokenizer)
        found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        if not found:
            raise UserError(
                f"{source}: expected a tokenizer (such as tokenizer.json), found none. Give a directory that has one."
            )
        for file in found:
            shutil.copyfile(file, directory / file.name)
        ids |= _special_ids(source)
        generation = _read_json(source / "generation_config.json")
    config = shape.to_hugging_face() | {"torch_dtype": str(dtype).removeprefix("torch.")} | ids
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation or ids)


def _special_ids(tokenizer: Path) -> dict[str, Any]:
    """{"eos_token_id": 2, ...} as far as the directory says."""
    config = _read_json(tokenizer / "config.json")
    if any(config.get(key) is not None for key in _SPECIAL_IDS):
        return {key: config.get(key) for key in _SPECIAL_IDS}
    settings = _read_json(tokenizer / "special_tokens_map.json") | _read_json(tokenizer / "tokenizer_config.json")
    content = _read_json(tokenizer / "tokenizer.json")
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    special = {}
    for key in _SPECIAL_IDS:
        token = settings.get(key.removesuffix("_id"))
        special[key] = ids.get(token["content"] if isinstance(token, dict) else token)
    return special


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found an error: {error}. Copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}. Copy it again.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

"""What stands beside the weights of a Hugging Face directory: its two configurations and the tokenizer's files."""

import json
from pathlib import Path
from typing import Any

import torch

from pipelines.config import UserError
from pipelines.families import ModelShape
from pipelines.text.tokenizer_files import copy_tokenizer, has_tokenizer, read_object, special_token
from pipelines.vocabulary import token_ids

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_hub_files(
    directory: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    tokenizer: str | Path | None = None,
    origin: str | Path | None = None,
) -> None:
    """Write config.json and generation_config.json for weights of `dtype`, and copy the tokenizer's files.

    tokenizer: a directory with a tokenizer, of a model or alone. The ids of its special tokens come from its own
    config.json and generation_config.json where it has them, else from its tokenizer files; they are null where
    unknown, since transformers would assume Llama 2's. Raises UserError where there is no tokenizer.
    origin: the model that this one was trained from. How text is generated with it (temperature, what ends a text) is
    generation_config.json's, and its special tokens' ids are config.json's, before the tokenizer's.
    """
    ids: dict[str, Any] = dict.fromkeys(_SPECIAL_IDS)
    generation: dict[str, Any] = {}
    if tokenizer is not None:
        source = Path(tokenizer)
        if not has_tokenizer(source):
            raise UserError(
                f"{source}: expected a tokenizer (such as tokenizer.json), found none. Give a directory that has one."
            )
        copy_tokenizer(source, directory)
        ids |= _special_ids(source)
        generation = read_object(source / "generation_config.json")
    if origin is not None:
        ids |= {key: value for key, value in _special_ids_of_model(Path(origin)).items() if value is not None}
        known = read_object(Path(origin) / "generation_config.json")
        generation = known if any(value is not None for value in known.values()) else generation
    config = shape.to_hugging_face() | {"torch_dtype": str(dtype).removeprefix("torch.")} | ids
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation or ids)


def _special_ids(tokenizer: Path) -> dict[str, Any]:
    """{"eos_token_id": 2, ...} as far as the directory says."""
    found = _special_ids_of_model(tokenizer)
    if any(value is not None for value in found.values()):
        return found
    ids = token_ids(tokenizer)
    special = {key: special_token(tokenizer, key.removesuffix("_id")) for key in _SPECIAL_IDS}
    return {key: ids.get(token[0]) if token else None for key, token in special.items()}


def _special_ids_of_model(directory: Path) -> dict[str, Any]:
    config = read_object(directory / "config.json")
    return {key: config.get(key) for key in _SPECIAL_IDS}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

"""The safetensors format: which files a model directory has, and what their headers say.

A file is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pipelines.config import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LISTED = 5  # tensors named in an error message


@dataclass(frozen=True)
class Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_index(directory: Path) -> dict[str, str]:
    """{tensor name: file name} of the directory's index; empty where there is none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: expected a Hugging Face model directory, found no directory. Check the path.")
    path = directory / INDEX
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a JSON object with a weight_map, found {error!r}. Copy it again.") from None


def model_files(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files of the index where there is one, else model.safetensors, else every *.safetensors."""
    if (directory / SINGLE).is_file():
        if weight_map and SINGLE not in weight_map.values():
            raise UserError(
                f"{directory}: expected one model, found both {SINGLE} and the files of {INDEX}. "
                "Remove those that do not belong to the model."
            )
        if not weight_map:
            return [directory / SINGLE]
    files = sorted({directory / name for name in weight_map.values()} or directory.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{directory}: expected *.safetensors files, found none. Weights in another format (such as "
            "pytorch_model.bin) are converted by loading them in transformers and calling save_pretrained."
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{directory}: expected the {len(files)} files of {INDEX}, missing {listed(missing)}. "
            "Download or copy them again."
        )
    return files


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises UserError unless header and file size agree to the byte."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file}: expected a safetensors file with a header of {length:,} bytes, found a file of {size:,} "
                "bytes: truncated or corrupt. Download or copy it again."
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: _header_entry(file, description) for name, description in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{file}: expected a safetensors header, found {error}: corrupt. Download or copy it again."
            ) from None
    end = sum(tensor_bytes(entry.shape, entry.dtype) for entry in entries.values())
    if size != 8 + length + end:
        raise UserError(
            f"{file}: expected {8 + length + end:,} bytes from its header, found {size:,}: truncated or corrupt. "
            "Download or copy it again."
        )
    return entries


def _header_entry(file: Path, description: dict[str, Any]) -> Entry:
    shape, dtype = tuple(int(size) for size in description["shape"]), DTYPES.get(description["dtype"])
    if dtype is None:
        raise ValueError(f"dtype {description['dtype']}")
    start, end = description["data_offsets"]
    if end - start != tensor_bytes(shape, dtype) or start < 0:
        raise ValueError(f"{end - start:,} bytes for {description['dtype']} {list(shape)}")
    return Entry(file, shape, dtype)


def tensor_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def listed(names: list[str]) -> str:
    return "; ".join(names[:_LISTED]) + (f"; and {len(names) - _LISTED} more" if len(names) > _LISTED else "")

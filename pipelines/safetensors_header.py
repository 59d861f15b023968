"""The safetensors format: which files a model directory has, what their headers say, and whether that is a model.

A file is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Headers alone are read, so that a hundred shards are checked before anything starts. Imports no torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipelines.config import UserError
from pipelines.families import HEAD, ModelShape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
WEIGHTS = ("F64", "F32", "F16", "BF16")  # what a model's weights may be
OTHERS = ("F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64", "C64")  # of the format, and of no model here
# What quantized weights bring with them, by the ends of their names.
QUANTIZATION = (
    *(".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_shape", ".input_scale"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".weight_format", ".absmax", ".quant_map", ".weight_blocks"),
)
DERIVED = ("rotary_emb.inv_freq",)  # what other writers put beside the weights and follows from config.json
_LISTED = 5  # tensors named in an error message
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """dtype: the format's name of it, as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_entries(directory: Path) -> dict[str, Entry]:
    """{name: entry} of the tensors in a directory's safetensors files.

    Raises UserError for a missing directory or file, a corrupt or truncated file (by name), a tensor that stands in
    two files, and an index that names a tensor where it is not.
    """
    entries: dict[str, Entry] = {}
    weight_map = read_index(directory)
    for file in model_files(directory, weight_map):
        for name, entry in read_header(file).items():
            if name in entries:
                raise UserError(
                    f"{directory}: expected each tensor once, found {name} in {entries[name].file.name} "
                    f"and in {file.name}. Remove the file that does not belong to the model."
                )
            entries[name] = entry
    for name, file_name in weight_map.items():
        if name not in entries or entries[name].file.name != file_name:
            raise UserError(
                f"{directory / INDEX}: expected {name} in {file_name}, found no such tensor there. "
                "Copy the directory again."
            )
    return entries


def check_model(directory: Path, shape: ModelShape) -> None:
    """Raises UserError unless a directory's headers are those of a model of this shape with unquantized weights."""
    expect_model(directory, read_entries(directory), shape)


def expect_model(directory: Path, entries: Mapping[str, Entry], shape: ModelShape) -> None:
    """As `check_model`, of entries that have been read. A tied model may store its head too."""
    expected = shape.tensor_shapes()
    for name in expected:  # before shapes and names, which packing changes
        if name in entries and entries[name].dtype not in WEIGHTS:
            raise UserError(
                f"{directory}: expected weights in float32, bfloat16 or float16, found {name} in "
                f"{entries[name].dtype}. Dequantize the model first."
            )
    if quantized := [name for name in entries if name not in expected and name.endswith(QUANTIZATION)]:
        raise UserError(
            f"{directory}: expected unquantized weights, found {len(quantized)} tensors of a quantization: "
            f"{listed(quantized)}. Dequantize the model first."
        )
    expect_tensors(directory, entries, expected, (*DERIVED, HEAD) if shape.tie_word_embeddings else DERIVED)


def expect_tensors(
    directory: Path, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], ignore: Iterable[str] = ()
) -> None:
    """Raises UserError unless these tensors are there with these shapes, and no other but those to ignore.

    ignore: ends of names of tensors that may be there without being read.
    """
    missing = [name for name in shapes if name not in entries]
    if missing:
        raise UserError(
            f"{directory}: expected the tensors that config.json describes, missing {len(missing)} of "
            f"{len(shapes)}: {listed(missing)}. Check config.json, or copy the directory again."
        )
    wrong = [
        f"{name}: expected {list(shape)}, found {list(entries[name].shape)}"
        for name, shape in shapes.items()
        if entries[name].shape != tuple(shape)
    ]
    if wrong:
        raise UserError(
            f"{directory}: expected tensors of the shape in config.json, {len(wrong)} of {len(shapes)} "
            f"differ: {listed(wrong)}. Correct config.json, or copy the directory again."
        )
    ignored = tuple(ignore)
    unknown = [name for name in entries if name not in shapes and not name.endswith(ignored)]
    if unknown:
        raise UserError(
            f"{directory}: expected only the tensors that config.json describes, found {len(unknown)} more: "
            f"{listed(unknown)}. Check config.json: the model has parts that would be left out."
        )


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def weight_bytes(directory: Path) -> int:
    """Of the safetensors files that make up a directory's model."""
    return sum(file.stat().st_size for file in model_files(directory, read_index(directory)))


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises UserError unless header and file size agree to the byte."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise UserError(f"{file}: expected a safetensors file, found a Git LFS pointer to one. Run git lfs pull.")
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise UserError(
                f"{file}: expected a safetensors file with a header of {length:,} bytes, found a file of {size:,} "
                "bytes: truncated or corrupt. Download or copy it again."
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: _header_entry(file, description) for name, description in header.items()}
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
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


def read_metadata(file: Path) -> dict[str, str]:
    """What a file that `read_header` takes says beside its tensors; {} where it says nothing."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        found: dict[str, str] = json.loads(stream.read(length)).get("__metadata__") or {}
    return found


def _header_entry(file: Path, description: dict[str, Any]) -> Entry:
    shape, dtype = tuple(int(size) for size in description["shape"]), str(description["dtype"])
    if dtype in OTHERS:
        raise UserError(
            f"{file}: expected weights in float32, bfloat16 or float16, found tensors in {dtype}. Dequantize the model "
            "first."
        )
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype}")
    start, end = description["data_offsets"]
    if end - start != tensor_bytes(shape, dtype) or start < 0 or min(shape, default=0) < 0:
        raise ValueError(f"{end - start:,} bytes for {dtype} {list(shape)}")
    return Entry(file, shape, dtype)


def tensor_bytes(shape: Iterable[int], dtype: str) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def listed(names: list[str]) -> str:
    return "; ".join(names[:_LISTED]) + (f"; and {len(names) - _LISTED} more" if len(names) > _LISTED else "")

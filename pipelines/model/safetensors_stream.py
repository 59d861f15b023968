"""Directories of safetensors files, read by slices and written tensor by tensor, larger than memory either way."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from pipelines import files
from pipelines.config import UserError
from pipelines.families import ModelShape
from pipelines.safetensors_header import INDEX, SINGLE, Entry, expect_model, expect_tensors, listed, read_entries

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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Announced = dict[str, tuple[tuple[int, ...], torch.dtype]]  # {name: (shape, dtype)}
_CHUNK_BYTES = 64 * 2**20  # of a tensor on its way to the file


class Tensors:
    """The tensors of a directory's safetensors files; opening it reads the headers alone.

    Which files: those of model.safetensors.index.json where there is one, else model.safetensors, else every
    *.safetensors. Raises UserError for a missing directory or file, a corrupt or truncated file (by name), and a
    tensor that stands in two files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._entries: dict[str, Entry] = read_entries(self.directory)
        self._open_files: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name).dtype]

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU; its pages are read from the file when they are touched."""
        return self._file(name).get_tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices start <= i < stop of one dim on the CPU; of the file, only their bytes are read."""
        size = self.shape(name)[dim]
        assert 0 <= start <= stop <= size, f"{name}: {start}:{stop} of dim {dim} with {size} indices"
        return self._file(name).get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]

    def unmap(self) -> None:
        """Let go of the files' pages that were read: they count as this process's memory. Reading opens them again."""
        self._open_files.clear()

    def expect(self, shapes: dict[str, tuple[int, ...]], ignore: Iterable[str] = ()) -> None:
        """Raises UserError unless these tensors are there with these shapes, and no other but those to ignore.

        ignore: ends of names of tensors that may be there without being read.
        """
        expect_tensors(self.directory, self._entries, shapes, ignore)

    def expect_model(self, shape: ModelShape) -> None:
        """Raises UserError unless the tensors are those of a model of this shape, unquantized."""
        expect_model(self.directory, self._entries, shape)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(
                f"{self.directory}: expected a tensor {name}, found none among {len(self._entries)} tensors. "
                "Check config.json, or copy the directory again."
            )
        return self._entries[name]

    def _file(self, name: str) -> Any:
        file = self._entry(name).file
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: expected a safetensors file, found: {error}. Copy it again.") from None
        return self._open_files[file]


class Writer:
    """Writes tensors one by one, in any order, into safetensors files, with an index where there are several.

    tensors: {name: (shape, dtype)} of everything that will be written; files are filled in this order, each with at
    most max_shard_bytes of data unless one tensor alone is larger. Everything is built in `partial`
    (`<directory>.partial`), where further files may be put, and renamed to `directory` by `close`. As a context
    manager it closes at the end, and after an exception removes what it built. Raises UserError when the disk is full,
    before the first tensor where that can be known.
    """

    def __init__(
        self,
        directory: str | Path,
        tensors: Announced,
        max_shard_bytes: float = 5e9,
    ) -> None:
        self.directory = Path(directory)
        self._tensors = tensors
        self._waiting = set(tensors)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        _require_space(self.directory, sum(tensor_bytes(*description) for description in tensors.values()))
        self._building = files.new_directory(self.directory)
        self.partial = self._building.__enter__()
        try:
            self._begin(_shards(tensors, max_shard_bytes))
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """tensor: on any device, contiguous or not; shape and dtype as announced."""
        assert name in self._waiting, f"{name} was not announced, or was written before"
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(self._tensors[name][0]), self._tensors[name][1]), (
            f"{name}: announced {self._tensors[name]}, found {(tuple(tensor.shape), tensor.dtype)}"
        )
        file, offset = self._places[name]
        rows = max(1, _CHUNK_BYTES // max(1, tensor_bytes(tensor.shape[1:], tensor.dtype)))
        with _full_disk_as_user_error(self.directory):
            for piece in tensor.detach().split(rows) if tensor.dim() else (tensor.detach(),):
                data = memoryview(piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
                while data:
                    written = os.pwrite(file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
        self._waiting.remove(name)

    def close(self) -> None:
        """Everything is on the disk, and `directory` appears whole, replacing an earlier one."""
        assert not self._waiting, f"{len(self._waiting)} tensors were not written: {listed(sorted(self._waiting))}"
        with _full_disk_as_user_error(self.directory):
            for file in self._files:
                file.close()
            self._building.__exit__(None, None, None)

    def abandon(self) -> None:
        """Remove what was built; `directory` stays as it was."""
        for file in self._files:
            file.close()
        with suppress(_Abandoned):
            self._building.__exit__(_Abandoned, _Abandoned(), None)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return self.abandon()
        try:
            self.close()
        except BaseException:
            self.abandon()
            raise

    def _begin(self, shards: list[list[str]]) -> None:
        with _full_disk_as_user_error(self.directory):
            for file, offsets in _begin_files(self.partial, self._tensors, shards):
                self._files.append(file)
                self._places |= {name: (file, offset) for name, offset in offsets.items()}


def write_hollow(directory: Path, tensors: Announced, max_shard_bytes: float = 5e9) -> None:
    """The files of a model in an existing directory: index, headers and sizes as a `Writer`'s, and no data. They are
    sparse: they take next to no space, and reading a tensor gives zeros."""
    for file, _ in _begin_files(directory, tensors, _shards(tensors, max_shard_bytes)):
        file.close()


def _begin_files(
    directory: Path, tensors: Announced, shards: list[list[str]]
) -> Iterator[tuple[BinaryIO, dict[str, int]]]:
    """(file, offset of each of its tensors) of every shard, open, with its header and at its full size; then the index
    where there are several."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        yield _begin_file(directory / name, tensors, shard)
    if len(shards) > 1:
        total = sum(tensor_bytes(*description) for description in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _begin_file(path: Path, tensors: Announced, names: list[str]) -> tuple[BinaryIO, dict[str, int]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wider dtypes first, as safetensors does, so that every tensor is aligned in a mapped file.
    for name in sorted(names, key=lambda name: -tensors[name][1].itemsize):
        shape, dtype = tensors[name]
        end = offset + tensor_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = path.open("wb", buffering=0)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + offset)
    return file, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}


def _shards(tensors: Announced, max_shard_bytes: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, description in tensors.items():
        size = tensor_bytes(*description)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _require_space(directory: Path, needed: int) -> None:
    existing = next(parent for parent in directory.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{directory}: expected {needed:,} bytes of free disk space, found {free:,}. "
            "Free some, or set run.directory to another disk."
        )


@contextmanager
def _full_disk_as_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not files.is_disk_error(error):
            raise
        raise UserError(
            f"{directory}: expected room for the weights, found the disk full while writing ({error.strerror}). "
            "Free some space, or set run.directory to another disk; what was half-written is removed."
        ) from None


def tensor_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


class _Abandoned(Exception):
    """Tells the directory under construction to remove itself."""

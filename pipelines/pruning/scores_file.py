"""scores.safetensors: one file of named arrays, and in its metadata what they were made of (scores_origin.py).

Arrays are float64; layers count from 1: hidden, ffn.<layer>, heads.<layer>, kv_groups.<layer>, block_influence, and
where the loss was differentiated taylor_layers. Others may add arrays of their own by `update`. Never the layout.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from pipelines import files
from pipelines.config import UserError
from pipelines.core.importance import Scores
from pipelines.families import ModelShape
from pipelines.safetensors_header import read_header
from pipelines.scores_origin import Origin

FILE = "scores.safetensors"
_BY_LAYER = ("ffn", "heads", "kv_groups")
_WHOLE = ("hidden", "block_influence", "taylor_layers")


def named_arrays(scores: Scores) -> dict[str, torch.Tensor]:
    """The arrays of the file, by name; layers from 1."""
    arrays = {name: value for name in _WHOLE if (value := getattr(scores, name)) is not None}
    for axis in _BY_LAYER:
        for number, row in enumerate(getattr(scores, axis), start=1):
            arrays[f"{axis}.{number}"] = row.contiguous()
    return arrays


def write(path: Path, scores: Scores | None, origin: Origin) -> None:
    """A new file in the place of what was there. scores: None where nothing had to be ranked."""
    counts = {"samples": scores.samples, "tokens": scores.tokens} if scores else {"samples": 0, "tokens": 0}
    _write(path, named_arrays(scores) if scores else {}, {"provenance": json.dumps(origin | counts)})


def update(path: Path, arrays: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Put arrays and metadata (values become JSON) into the file, beside what it holds under other names.

    Whole or not at all; the file is made where there is none. For one process.
    """
    held, words = (read_arrays(path), read_notes(path)) if path.is_file() else ({}, {})
    added = {name: value.detach().cpu().contiguous() for name, value in arrays.items()}
    _write(path, held | added, {name: json.dumps(value) for name, value in (words | dict(metadata)).items()})


def copy(given: Path, path: Path) -> None:
    """Another run's file as one's own, with all that it says of its origin; what one has measured of removed layers
    (pruning/removal.py) stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    removed = {n: v for n, v in read_arrays(path).items() if n.startswith("removed")} if path.is_file() else {}
    told = {"removal": read_notes(path)["removal"]} if removed else {}
    files.write_atomic(path, given.read_bytes())
    if removed:
        update(path, removed, told)


def present(path: Path) -> list[str]:
    """The names of the file's arrays."""
    return list(read_header(path))


def read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Every array of the file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def check_finite(path: Path, names: Sequence[str]) -> None:
    """Raises UserError where one of these arrays has NaN or infinity, by which nothing can be ranked."""
    arrays = read_arrays(path)
    bad = [name for name in names if not arrays[name].isfinite().all()]
    if bad:
        raise UserError(
            f"prune.scores={path}: expected finite numbers, found NaN or infinity in {', '.join(bad[:5])}. Leave "
            "prune.scores out to measure them."
        )


def read_notes(path: Path) -> dict[str, Any]:
    """The metadata by name: `provenance`, and what `update` was given."""
    with safe_open(path, framework="pt") as file:
        return {name: json.loads(value) for name, value in (file.metadata() or {}).items()}


def read(path: Path, teacher: ModelShape) -> Scores:
    """The scores of a file that has been checked. Arrays that it lacks are NaN, but taylor_layers, which are None."""
    arrays, origin = read_arrays(path), read_notes(path)["provenance"]
    layers = teacher.num_hidden_layers
    sizes = {
        "ffn": teacher.intermediate_size,
        "heads": teacher.num_attention_heads,
        "kv_groups": teacher.num_key_value_heads,
    }

    def rows(axis: str) -> torch.Tensor:
        absent = torch.full((sizes[axis],), torch.nan, dtype=torch.float64)
        return torch.stack([arrays.get(f"{axis}.{number}", absent) for number in range(1, layers + 1)])

    def whole(name: str, size: int) -> torch.Tensor:
        return arrays.get(name, torch.full((size,), torch.nan, dtype=torch.float64))

    return Scores(
        hidden=whole("hidden", teacher.hidden_size),
        ffn=rows("ffn"),
        heads=rows("heads"),
        kv_groups=rows("kv_groups"),
        block_influence=whole("block_influence", layers),
        samples=origin["samples"],
        tokens=origin["tokens"],
        taylor_layers=arrays.get("taylor_layers"),
    )


def _write(path: Path, arrays: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    files.write_atomic(path, save(dict(arrays), metadata))

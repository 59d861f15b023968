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
from pipelines.scores_origin import Origin, shapes

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
    """Scores in the place of those that were there; measured removals (pruning/removal.py) stay. scores: None where
    nothing had to be ranked."""
    removed, told = _removals(path)
    notes = {"provenance": origin | _counts(scores)} | told
    _write(path, (named_arrays(scores) if scores else {}) | removed, notes)


def add(path: Path, scores: Scores, names: Sequence[str]) -> None:
    """Put these arrays of scores, and how much was scored, into a file of the same origin that lacks them."""
    arrays, origin = named_arrays(scores), read_notes(path)["provenance"]
    update(path, {name: arrays[name] for name in names}, {"provenance": origin | _counts(scores)})


def update(path: Path, arrays: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Put arrays and metadata (values become JSON) into the file, beside what it holds under other names.

    Whole or not at all; the file is made where there is none. For one process.
    """
    held, words = (read_arrays(path), read_notes(path)) if path.is_file() else ({}, {})
    added = {name: value.detach().cpu().contiguous() for name, value in arrays.items()}
    _write(path, held | added, words | dict(metadata))


def copy(given: Path, path: Path) -> None:
    """Another run's file as one's own, with all that it says of its origin; one's own measured removals stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    removed, told = _removals(path)
    if removed:
        _write(path, read_arrays(given) | removed, read_notes(given) | told)
    else:
        files.write_atomic(path, given.read_bytes())


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
    held, origin = read_arrays(path), read_notes(path)["provenance"]
    arrays = {
        name: held.get(name, torch.full(shape, torch.nan, dtype=torch.float64))
        for name, shape in shapes(teacher).items()
    }
    by_layer = {
        axis: torch.stack([arrays[f"{axis}.{number}"] for number in range(1, teacher.num_hidden_layers + 1)])
        for axis in _BY_LAYER
    }
    return Scores(
        hidden=arrays["hidden"],
        **by_layer,
        block_influence=arrays["block_influence"],
        samples=origin["samples"],
        tokens=origin["tokens"],
        taylor_layers=held.get("taylor_layers"),
    )


def _counts(scores: Scores | None) -> dict[str, int]:
    return {"samples": scores.samples, "tokens": scores.tokens} if scores else {"samples": 0, "tokens": 0}


def _removals(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(arrays, metadata) that a file has of removed layers; none where it is missing or damaged."""
    try:
        if not path.is_file() or "removed" not in present(path):
            return {}, {}
        told = {"removal": read_notes(path)["removal"]}
    except (UserError, KeyError, ValueError):
        return {}, {}
    return {name: value for name, value in read_arrays(path).items() if name.startswith("removed")}, told


def _write(path: Path, arrays: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
    """notes: the metadata, whose values become JSON."""
    files.write_atomic(path, save(dict(arrays), {name: json.dumps(value) for name, value in notes.items()}))

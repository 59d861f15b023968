"""scores.safetensors: float64 arrays hidden, ffn.<layer>, heads.<layer> and block_influence (layers count from 1), and
in its metadata what they were made of. Never the layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from pipelines import artifacts, console, files
from pipelines.core.importance import Scores
from pipelines.families import ModelShape

AGGREGATION = (
    "channel: L2 norm over samples of the mean over the sequence of |activation|; hidden: sum over both norms of every "
    "layer; head: L2 norm over its channels; block influence: 1 - mean cos(layer input, layer output) over tokens"
)


def named_arrays(scores: Scores) -> dict[str, torch.Tensor]:
    """hidden (hidden,), ffn.<layer> (neurons,), heads.<layer> (heads,), block_influence (layers,); layers from 1."""
    arrays = {"hidden": scores.hidden, "block_influence": scores.block_influence}
    for number in range(1, len(scores.block_influence) + 1):
        arrays[f"ffn.{number}"] = scores.ffn[number - 1].contiguous()
        arrays[f"heads.{number}"] = scores.heads[number - 1].contiguous()
    return arrays


def _source(context: artifacts.StageContext) -> dict[str, Any]:
    """What decides the scores: the teacher's and the corpus's files, and the calibration settings; never the layout."""
    config, inputs = context.config, artifacts.read_manifest(context.directory).get("inputs", {})
    return {
        "teacher": str(artifacts.teacher_directory(config)),
        "files": {name: inputs[name]["files"] for name in ("teacher", "corpus") if name in inputs},
        "sequence_length": config.prune.sequence_length,
        "calibration_samples": config.prune.calibration_samples,
        "precision": config.prune.precision.value,
        "document_mask": config.prune.document_mask,
        "aggregation": AGGREGATION,
    }


def provenance(context: artifacts.StageContext, scores: Scores | None) -> dict[str, Any]:
    counts = {"samples": scores.samples, "tokens": scores.tokens} if scores else {"samples": 0, "tokens": 0}
    return _source(context) | counts


def read_scores(context: artifacts.StageContext, teacher: ModelShape) -> Scores | None:
    """The scores of an attempt that was killed while it wrote the student; None where none are of the same source."""
    path, source = context.directory / "scores.safetensors", _source(context)
    if not path.is_file() or not source["files"]:
        return None
    with safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {}).get("provenance", "{}"))
        if not found.get("samples") or {name: found.get(name) for name in source} != source:
            return None
        numbers = range(1, teacher.num_hidden_layers + 1)
        console.say(f"prune  scores of {found['samples']} samples taken from {path}")
        return Scores(
            hidden=file.get_tensor("hidden"),
            ffn=torch.stack([file.get_tensor(f"ffn.{number}") for number in numbers]),
            heads=torch.stack([file.get_tensor(f"heads.{number}") for number in numbers]),
            block_influence=file.get_tensor("block_influence"),
            samples=found["samples"],
            tokens=found["tokens"],
        )


def update(path: Path, arrays: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Put arrays and metadata (values become JSON) into the file, beside what it holds under other names.

    Whole or not at all; the file is made where there is none. For one process.
    """
    held: dict[str, torch.Tensor] = {}
    words: dict[str, str] = {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            words = file.metadata() or {}
    told = {name: json.dumps(value) for name, value in metadata.items()}
    files.write_atomic(path, save({**held, **arrays}, words | told))

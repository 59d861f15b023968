"""What scores of pruning were made of, and whether they are those that a configuration asks for. Imports no torch.

The metadata `provenance` of scores.safetensors is a JSON object of

    model            hash of the teacher's config.json and weight files; teacher: where they lay
    data             hash of the calibration split's files; corpus: where they lay
    importance, sequence_aggregation, sample_aggregation, sequence_length, calibration_samples, precision, document_mask
                     of prune.*, as they were
    samples, tokens  that were scored; 0 where nothing had to be
    aggregation      the formula in words; versions: of the packages

and never the layout, on which no score depends.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines import artifacts, lineage, planning
from pipelines.choices import BY_REMOVAL, DepthMethod, Importance, Measure
from pipelines.config import Config, UserError, searches
from pipelines.families import ModelShape
from pipelines.files import file_hash
from pipelines.prune_settings import PRUNED_SIZES
from pipelines.safetensors_header import model_files, read_header, read_index, read_metadata
from pipelines.vocabulary import read_blend

AGGREGATION = (
    "activation: per channel over the sequence, then over samples; hidden: sum over both norms of every layer; head, "
    "KV group: L2 norm over its channels; block influence: 1 - mean cos(layer input, layer output) over tokens; "
    "taylor: |d loss / d mask| of a sample's mean cross-entropy, over samples"
)
Origin = dict[str, Any]


def model_hash(directory: Path, sidecars: Path) -> str:
    """Of config.json and the weight files that belong to the model, by name and content."""
    named = [directory / "config.json", *model_files(directory, read_index(directory))]
    return _digest({file.name: file_hash(file, sidecars) for file in named})


def data_hash(corpus: Path, sidecars: Path) -> str | None:
    """Of the calibration split's files alone, in the split's order; None where the corpus has no such split."""
    parts = read_blend(corpus)["splits"].get("calibration")
    if not parts:
        return None
    files = [f"{part['prefix']}{ending}" for part in parts for ending in (".bin", ".idx")]
    return _digest([file_hash(corpus / file, sidecars) for file in files])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def asked(config: Config, *, data: bool = True) -> Origin:
    """The origin that scores of this configuration have, besides what scoring counts. Hashes what has no hash yet.

    data: the calibration split too; without it that is None.
    """
    teacher, corpus = artifacts.teacher_directory(config), artifacts.corpus_directory(config)
    sidecars, settings = artifacts.sidecar_directory(config), config.prune
    return {
        "model": model_hash(teacher, sidecars),
        "teacher": str(teacher),
        "data": data_hash(corpus, sidecars) if data and (corpus / "blend.json").is_file() else None,
        "corpus": str(corpus),
        "importance": settings.importance.value,
        "sequence_aggregation": settings.sequence_aggregation.value,
        "sample_aggregation": settings.sample_aggregation.value,
        "sequence_length": settings.sequence_length,
        "calibration_samples": settings.calibration_samples,
        "precision": settings.precision.value,
        "document_mask": settings.document_mask,
        "aggregation": AGGREGATION,
        "versions": lineage.versions(),
    }


def read_origin(file: Path) -> Origin:
    """Of a file of scores. Raises UserError where it is missing, truncated, corrupt or no such file."""
    if not file.is_file():
        found = "a directory" if file.is_dir() else "none"
        raise UserError(f"{file}: expected a file scores.safetensors of a prune stage, found {found}. Check the path.")
    read_header(file)
    try:
        origin = json.loads(read_metadata(file)["provenance"])
        if not isinstance(origin, dict) or not isinstance(origin["samples"], int):
            raise ValueError
        return origin
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{file}: expected scores of a prune stage, found a safetensors file without their provenance. Give the "
            "scores.safetensors that stage=prune wrote."
        ) from None


def needed(config: Config, teacher: ModelShape) -> list[str]:
    """The names of the arrays by which this configuration ranks what can be pruned; none of what is random or given."""
    settings = config.prune
    channels, layers = ranked(config, teacher)
    names = list(shapes(teacher)) if channels and settings.importance is not Importance.random else []
    names = [name for name in names if name not in ("block_influence", "taylor_layers")]
    by_method = {DepthMethod.block_influence: "block_influence", DepthMethod.taylor: "taylor_layers"}
    return names + [by_method[settings.depth_method]] if layers and settings.depth_method in by_method else names


def ranked(config: Config, teacher: ModelShape) -> tuple[bool, bool]:
    """Whether channels, neurons, heads or KV groups have to be ranked, and whether layers have."""
    student, searched = planning.target_shape(teacher, config.student), searches(config)
    smaller = {name for name in PRUNED_SIZES if getattr(student, name) != getattr(teacher, name)}
    layers = not config.student.drop_layers and (searched or "num_hidden_layers" in smaller)
    return searched or bool(smaller - {"num_hidden_layers"}), layers


def reads_calibration(config: Config, teacher: ModelShape) -> bool:
    """Whether prune reads the calibration split: to score, to measure losses without layers, or to search."""
    scored = bool(needed(config, teacher)) and not config.prune.scores
    by_loss = config.prune.depth_measure is Measure.loss and measures_removals(config)
    return scored or (ranked(config, teacher)[1] and by_loss) or searches(config)


def measures_removals(config: Config) -> bool:
    """Whether layers are chosen by what their removal costs, where any goes."""
    return config.prune.depth_method in BY_REMOVAL and not config.student.drop_layers


def shapes(teacher: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shape of every array that scores of this teacher can have."""
    layers = teacher.num_hidden_layers
    sizes = {"hidden": (teacher.hidden_size,), "block_influence": (layers,), "taylor_layers": (layers,)}
    for number in range(1, layers + 1):
        sizes[f"ffn.{number}"] = (teacher.intermediate_size,)
        sizes[f"heads.{number}"] = (teacher.num_attention_heads,)
        sizes[f"kv_groups.{number}"] = (teacher.num_key_value_heads,)
    return sizes


def differences(file: Path, wanted: Origin, needed: list[str], *, of_same_data: bool = True) -> list[str]:
    """What makes a file's scores others than those wanted, one line each: `importance: activation, not taylor`.

    needed: names of arrays; what does not enter them is not compared. of_same_data: compare what they were measured on.
    """
    found, keys = read_origin(file), ["model"]
    if of_same_data:
        keys += ["data", "sequence_length", "calibration_samples", "precision", "document_mask"]
    if "hidden" in needed:
        keys.append("importance")
        keys += ["sequence_aggregation"] if wanted["importance"] == "activation" else []
    if "hidden" in needed or "taylor_layers" in needed:
        keys.append("sample_aggregation")
    return [f"{key}: {found.get(key)}, not {wanted[key]}" for key in keys if found.get(key) != wanted[key]]


def check_given(file: Path, wanted: Origin, needed: list[str], teacher: ModelShape) -> None:
    """prune.scores. Raises UserError unless the file holds the needed arrays of this model, as they are asked for."""
    origin, entries = read_origin(file), read_header(file)
    lines = differences(file, wanted, needed, of_same_data=False)
    if any(line.startswith("model:") for line in lines):
        raise UserError(
            f"prune.scores={file}: expected scores of the model in {wanted['teacher']} (hash {wanted['model'][:12]}), "
            f"found those of {origin.get('teacher')} (hash {str(origin.get('model'))[:12]}). Give scores of this "
            "teacher, or leave prune.scores out."
        )
    if lines:
        raise UserError(
            f"prune.scores={file}: found scores of another kind than asked for: {'; '.join(lines)}. Ask for what it "
            "has, or leave prune.scores out."
        )
    missing = [name for name in needed if name not in entries]
    if missing:
        raise UserError(
            f"prune.scores={file}: expected the arrays {', '.join(needed[:5])}{', ...' if needed[5:] else ''}, missing "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}. Leave prune.scores out to measure them."
        )
    expected = shapes(teacher)
    for name in needed:
        entry = entries[name]
        if (entry.shape, entry.dtype) != (expected[name], "F64"):
            raise UserError(
                f"prune.scores={file}: expected {name} of shape {list(expected[name])} in F64, found "
                f"{list(entry.shape)} in {entry.dtype}. Leave prune.scores out to measure it."
            )

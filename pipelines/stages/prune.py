"""Pruning in width and depth: score the teacher on calibration data, select, slice its safetensors.

Writes hf/ (the student), kept.json, and scores.safetensors (float64 arrays hidden, ffn.<layer>, heads.<layer> and
block_influence; layers count from 1). Where nothing has to be ranked nothing is scored and there are no arrays.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save

from pipelines import artifacts, console, files
from pipelines.config import Config, DepthMethod, Layout, StudentConfig, UserError, layout, without_context
from pipelines.core.importance import Scores
from pipelines.core.selection import Kept, check_heads, check_layers, check_target, select
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.scoring import score
from pipelines.model.slicing import slice_checkpoint, sliced_shape
from pipelines.model.weights import load_hugging_face
from pipelines.model.windows import Windows, end_of_document, split_prefixes
from pipelines.vocabulary import check_vocabulary

AGGREGATION = (
    "channel: L2 norm over samples of the mean over the sequence of |activation|; hidden: sum over both norms of every "
    "layer; head: L2 norm over its channels; block influence: 1 - mean cos(layer input, layer output) over tokens"
)


QUICKLY_WRITTEN = 100_000_000  # parameters: below, writing takes a second or two and shows no bar


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, ranks = context.config, without_context(layout(context.config.parallel))
    directory = artifacts.teacher_directory(config)
    teacher = read_shape(directory)
    check_student(config.student, config.prune.depth_method, teacher)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    started = time.monotonic()
    scores, seconds = None, 0.0
    if needs_scores(config.student, teacher):
        scores = _read_scores(context, teacher)
        if scores is None:
            scores = _score(config, ranks, directory, teacher)
            seconds = time.monotonic() - started
    else:
        console.say("prune  nothing has to be ranked: no scoring, the prune.* calibration settings have no effect")
    kept = _select(scores, config.student, teacher)
    student = sliced_shape(teacher, kept)
    parallel.on_first_rank(lambda: _write(context, directory, teacher, kept, scores))
    before = teacher.parameters()
    console.say(
        f"prune  {before:,} -> {student.parameters():,} parameters ({student.parameters() / before:.1%}); hidden "
        f"{student.hidden_size}, ffn {student.intermediate_size}, heads {student.num_attention_heads}, "
        f"layers {student.num_hidden_layers}"
    )
    return {
        "model": str(context.directory / "hf"),
        "parameters_before": before,
        "parameters_after": student.parameters(),
        "non_embedding_parameters_before": teacher.non_embedding_parameters(),
        "non_embedding_parameters_after": student.non_embedding_parameters(),
        "ratio": student.parameters() / before,
        "dropped_layers": sorted(set(range(1, teacher.num_hidden_layers + 1)) - set(kept.layers)),
        "calibration_samples": scores.samples if scores else 0,
        "calibration_tokens": scores.tokens if scores else 0,
        "scoring_seconds": round(seconds, 2),
        "scoring_tokens_per_second": round(scores.tokens / seconds, 1) if scores and seconds else None,
    }


# The target


def check_student(student: StudentConfig, method: DepthMethod, teacher: ModelShape) -> None:
    """Raises UserError where the target does not fit the teacher or contradicts itself. Needs no scores."""
    for name in ("hidden_size", "intermediate_size"):
        if getattr(student, name) is not None:
            check_target(f"student.{name}", getattr(student, name), getattr(teacher, name))
    if student.num_attention_heads is not None:
        check_heads(student.num_attention_heads, teacher.num_attention_heads, teacher.num_key_value_heads)
    layers = teacher.num_hidden_layers
    check_layers(layers, keep=student.num_hidden_layers, drop=student.drop_layers)
    if method is DepthMethod.layers and not student.drop_layers and (student.num_hidden_layers or layers) < layers:
        raise UserError(
            f"prune.depth_method=layers: expected student.drop_layers with {layers - (student.num_hidden_layers or 0)} "
            f"layers, counted from 1, to reach student.num_hidden_layers={student.num_hidden_layers}, found none. "
            "Name the layers, or set prune.depth_method=block_influence."
        )


def needs_scores(student: StudentConfig, teacher: ModelShape) -> bool:
    """Whether anything has to be ranked: an axis that shrinks, or layers to choose."""
    axes = ["hidden_size", "intermediate_size", "num_attention_heads"]
    if not student.drop_layers:
        axes.append("num_hidden_layers")
    return any(getattr(student, name) not in (None, getattr(teacher, name)) for name in axes)


def _select(scores: Scores | None, student: StudentConfig, teacher: ModelShape) -> Kept:
    return select(
        scores,
        hidden_size=teacher.hidden_size,
        ffn_size=teacher.intermediate_size,
        heads=teacher.num_attention_heads,
        groups=teacher.num_key_value_heads,
        layers=teacher.num_hidden_layers,
        keep_hidden=student.hidden_size,
        keep_ffn=student.intermediate_size,
        keep_heads=student.num_attention_heads,
        keep_layers=student.num_hidden_layers,
        drop_layers=student.drop_layers,
    )


# Scoring


def _score(config: Config, ranks: Layout, directory: Path, teacher: ModelShape) -> Scores:
    settings = config.prune
    length, samples = settings.sequence_length, settings.calibration_samples
    windows = _calibration_windows(config, directory, teacher)
    model = build_model(
        teacher,
        sequence_parallel=ranks.sequence_parallel,
        precision=settings.precision.value,
        sequence_length=length,
    )
    load_hugging_face(model, directory, teacher)
    batches = calibration_batches(
        windows,
        samples,
        settings.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    started = time.monotonic()
    with console.progress("prune  scoring", samples, "samples") as bar:

        def advance(done: int) -> None:
            tokens = (bar.done + done) * length
            bar.advance(done, detail=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")

        return score(model, batches, micro_batch_size=settings.micro_batch_size, advance=advance)


def calibration_batches(
    windows: Windows, samples: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`samples` windows spread evenly over the split, the same at every layout, dealt out to the data ranks in turn.

    With windows.end_of_document they are separated ones, which become samples by micro_batch_size 1 alone.
    """
    assert windows.end_of_document is None or micro_batch_size == 1
    chosen = [sample * len(windows) // samples for sample in range(samples)][data_rank::data_size]
    for start in range(0, len(chosen), micro_batch_size):
        rows = chosen[start : start + micro_batch_size]
        tokens = torch.stack([windows[row] for row in rows])[:, :-1]
        mask = torch.stack([windows.mask(row) for row in rows])
        batch = {
            "tokens": tokens,
            "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
            "loss_mask": mask,
        }
        yield windows.laid_out(batch)


def _calibration_windows(config: Config, directory: Path, teacher: ModelShape) -> Windows:
    corpus, settings = artifacts.corpus_directory(config), config.prune
    prefixes = split_prefixes(corpus, "calibration")
    check_vocabulary(corpus, directory, teacher.vocab_size)
    end = end_of_document(corpus, "calibration") if settings.document_mask else None
    windows = Windows(prefixes, settings.sequence_length, end)
    if len(windows) < settings.calibration_samples:
        raise UserError(
            f"prune.calibration_samples: expected {settings.calibration_samples} sequences of "
            f"{settings.sequence_length} tokens in the calibration split of {corpus}, found {len(windows)}. Lower "
            "prune.calibration_samples or prune.sequence_length, or make a corpus with more text or a larger "
            "data.calibration_fraction."
        )
    return windows


# The artifact


def _write(
    context: artifacts.StageContext, directory: Path, teacher: ModelShape, kept: Kept, scores: Scores | None
) -> None:
    arrays = named_arrays(scores) if scores else {}
    data = save(arrays, {"provenance": json.dumps(_provenance(context, scores))})
    files.write_atomic(context.directory / "scores.safetensors", data)
    student = sliced_shape(teacher, kept)
    content = {**asdict(kept), "teacher": teacher.to_hugging_face(), "student": student.to_hugging_face()}
    files.write_atomic(context.directory / "kept.json", json.dumps(content) + "\n")
    if student.parameters() < QUICKLY_WRITTEN:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept)
        return
    with console.progress("prune  writing", student.parameters(), "parameters") as bar:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept, advance=bar.advance)


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


def _provenance(context: artifacts.StageContext, scores: Scores | None) -> dict[str, Any]:
    counts = {"samples": scores.samples, "tokens": scores.tokens} if scores else {"samples": 0, "tokens": 0}
    return _source(context) | counts


def _read_scores(context: artifacts.StageContext, teacher: ModelShape) -> Scores | None:
    """The scores of an attempt that was killed while it wrote the student; None where none are of the same source."""
    path, source = context.directory / "scores.safetensors", _source(context)
    if not path.is_file() or not source["files"]:
        return None
    with safe_open(path, framework="pt") as file:
        provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
        if not provenance.get("samples") or {name: provenance.get(name) for name in source} != source:
            return None
        numbers = range(1, teacher.num_hidden_layers + 1)
        console.say(f"prune  scores of {provenance['samples']} samples taken from {path}")
        return Scores(
            hidden=file.get_tensor("hidden"),
            ffn=torch.stack([file.get_tensor(f"ffn.{number}") for number in numbers]),
            heads=torch.stack([file.get_tensor(f"heads.{number}") for number in numbers]),
            block_influence=file.get_tensor("block_influence"),
            samples=provenance["samples"],
            tokens=provenance["tokens"],
        )

"""Pruning in width and depth: score the teacher on calibration data, select, slice its safetensors.

Writes hf/ (the student), kept.json, and scores.safetensors (float64 arrays hidden, ffn.<layer>, heads.<layer> and
block_influence; layers count from 1). Where nothing has to be ranked nothing is scored and there are no arrays.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from pipelines import artifacts, console, files
from pipelines.choices import DepthMethod
from pipelines.config import Config, Layout, StudentConfig, UserError, layout, without_context
from pipelines.core.importance import Scores
from pipelines.core.selection import Kept, check_heads, check_layers, check_target, select
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.scoring import score
from pipelines.model.slicing import slice_checkpoint, sliced_shape
from pipelines.model.weights import load_hugging_face
from pipelines.pruning.calibration import calibration_batches, calibration_windows
from pipelines.pruning.scores_file import named_arrays, provenance, read_scores, update

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
        scores = read_scores(context, teacher)
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
    windows = calibration_windows(config, directory, teacher)
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


# The artifact


def _write(
    context: artifacts.StageContext, directory: Path, teacher: ModelShape, kept: Kept, scores: Scores | None
) -> None:
    arrays = named_arrays(scores) if scores else {}
    update(context.directory / "scores.safetensors", arrays, {"provenance": provenance(context, scores)})
    student = sliced_shape(teacher, kept)
    content = {**asdict(kept), "teacher": teacher.to_hugging_face(), "student": student.to_hugging_face()}
    files.write_atomic(context.directory / "kept.json", json.dumps(content) + "\n")
    if student.parameters() < QUICKLY_WRITTEN:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept)
        return
    with console.progress("prune  writing", student.parameters(), "parameters") as bar:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept, advance=bar.advance)
